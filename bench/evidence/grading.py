"""Masked attention in grading: a synthetic cohort whose pen marks correlate with the grade in only one centre.

    python -m bench.evidence.grading                 # writes docs/grading.md; resumes an earlier run
    python -m bench.evidence.grading --real DIR      # with the section on real tissue
    python -m bench.evidence.grading --quick         # a trial on two seeds of a few slides, which writes no page

Three levels (patches, regions, slide) are trained with and without glass on slides of the inside centre, and judged on
other patients of that centre, on the same tissue with shuffled marks, and on the same tissue from the other centre. The
results of every arm and seed are stored in ``--run``. Two seeds can run in two processes with ``--seeds``, and
``--write`` then writes the page from the stored results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.evidence.grading_arms import ARMS, MAIN, Bench, result_of, slug
from bench.evidence.grading_model import Plan
from bench.evidence.grading_tables import ablation_table, kappa_table, map_table, time_line
from bench.evidence.table import write_section
from maskattn.files import replacing

__all__ = ["QUICK", "main", "results_in"]

QUICK = Plan(patients=6, test_patients=6, patch_steps=3, slide_steps=3, patch_batch=16, slide_batch=4, explained=3)


def results_in(folder: Path, seeds: Sequence[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the stored results, by arm and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in ARMS:
        for seed in seeds:
            path = folder / f"seed{seed}" / f"{slug(arm.name)}.json"
            if path.exists():
                found.setdefault(arm.name, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _check_plan(folder: Path, plan: Plan) -> None:
    """Exit if a folder holds the results of another plan; otherwise store the plan in it."""
    path = folder / "plan.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != asdict(plan):
        sys.exit(f"{folder} holds a run of other sizes; name another folder with --run, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(plan)), encoding="utf-8")


def _run(folder: Path, seeds: Sequence[int], plan: Plan, names: Sequence[str]) -> None:
    """Run the two arms of the main question for every seed, then the other arms."""
    asked = [arm for arm in ARMS if arm.name in names]
    for arms in ([arm for arm in asked if arm.name in MAIN], [arm for arm in asked if arm.name not in MAIN]):
        for seed in seeds if arms else ():
            of_seed = folder / f"seed{seed}"
            of_seed.mkdir(parents=True, exist_ok=True)
            bench = Bench(seed, plan, of_seed)
            for arm in arms:
                result = result_of(bench, arm)
                print(f"seed {seed}, {arm.name}: {result['seconds']:.0f} s of processor time", flush=True)


def main() -> None:
    """Draw, train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], help="some of them, by name")
    parser.add_argument("--run", type=Path, default=Path.home() / ".cache" / "maskattn-grading")
    parser.add_argument("--page", type=Path, default=Path("docs/grading.md"))
    parser.add_argument("--real", type=Path, help="folder of real material, with glas/")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "maskattn-evidence")
    parser.add_argument("--no-page", action="store_true", help="run and store the results, but write no page")
    parser.add_argument("--write", action="store_true", help="run nothing, and write the page from stored results")
    parser.add_argument("--quick", action="store_true", help="a trial on a few slides, which writes no page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that weights do not depend on the number of cores
    plan = QUICK if arguments.quick else Plan()
    seeds = arguments.seeds or (range(2) if arguments.quick else range(5))
    folder = arguments.run / "quick" if arguments.quick else arguments.run
    _check_plan(folder, plan)
    if not arguments.write:
        _run(folder, seeds, plan, arguments.arms)
    results = results_in(folder, seeds)
    sections = {
        "grading kappa": kappa_table(results),
        "grading maps": map_table(results),
        "grading ablations": ablation_table(results),
        "grading time": time_line(results),
    }
    if arguments.real:
        from bench.evidence.grading_real import real_section

        sections["grading real"] = real_section(arguments.real, arguments.cache, arguments.quick)
    for name, text in sections.items():
        print(f"\n{text}", flush=True)
        if not (arguments.quick or arguments.no_page):
            write_section(arguments.page, name, text)
    if not (arguments.quick or arguments.no_page):
        from bench.evidence.grading_pictures import draw_cohort_picture, draw_map_picture

        images = arguments.page.parent / "images"
        draw_cohort_picture(images / "grading_cohort.png")
        draw_map_picture(folder, images / "grading_maps.png", plan, seeds[0])


if __name__ == "__main__":
    main()
