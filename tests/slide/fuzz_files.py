"""Hand damaged slide files to what users run: none may crash it, hang it, leave half an output or be refused unclearly.

``python tests/slide/fuzz_files.py --files 1000 --seed 0 [--given FOLDER] [--keep DIR]`` prints counts by kind of file
and by outcome, and ends with 1 where there was a fault. Of ten files four are TIFF, three SVS and three DICOM. The same
file is made again, and kept, by ``--seed N --only K --keep DIR``, with the same slides given; what was kept is examined
again by ``--again DIR``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from random import Random

# Before numpy is loaded: small work is quickest on one thread, and a thread would be lost where a process is forked.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
_places = [str(Path(__file__).resolve().parents[level]) for level in (0, 1, 2)]
sys.path[:0] = _places
os.environ["PYTHONPATH"] = os.pathsep.join(_places)  # the server of processes knows no other way to what it preloads

from fuzz_damage import damage  # noqa: E402
from fuzz_pool import Limits, Result, run_tasks  # noqa: E402
from fuzz_sources import KINDS, Source, draw_sources, given_sources  # noqa: E402

FINE = ("read", "in part", "refused")
FAULTS = ("crash", "hang", "half output", "memory", "exception", "unclear message", "wrong result")
OUTCOMES = FINE + FAULTS
VERSIONED = ("openslide-python", "openslide-bin", "tifffile", "imagecodecs", "pydicom", "numpy", "torch")
REPORTED = """Each file is a slide with one to four damages: bits flipped, bytes overwritten, zeroed, cut, swapped,
doubled or let in, anywhere or in what readers trust (directories, tile tables, JPEG markers, XML, DICOM elements). It
is opened, described, its tissue found and drawn, tiles read in and beyond it, and one in four is predicted. "In part":
opened, and something of it refused; "refused": not opened; both in a sentence that says the rule, what came and the
remedy. A hang is more than 20 s of processor time, or 200 s of waiting; memory, more than 2 GiB above the start."""
SHARES = ("TIFF",) * 4 + ("SVS",) * 3 + ("DICOM",) * 3
Task = tuple[Path, Path, int, bool]
SHARE_GIVEN, SHARE_PREDICTED = 0.2, 0.25


@dataclass(frozen=True)
class Case:
    """A damaged file: its number, the slide that it was, what was done to it, where it lies."""

    number: int
    source: Source
    operations: tuple[str, ...]
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "slide" / self.source.path.name


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case."""

    case: Case
    outcome: str
    stage: str
    detail: str
    processor_s: float
    wall_s: float


def make_case(number: int, seed: int, sources: list[Source], folder: Path) -> Case:
    """Damage a slide; everything follows from the seed and the number."""
    rng = Random(f"{seed}/{number}")
    of_kind = [source for source in sources if source.kind == SHARES[number % len(SHARES)]]
    drawn = [source for source in of_kind if " given, " not in source.name]
    given = [source for source in of_kind if " given, " in source.name]
    source = rng.choice(given if given and rng.random() < SHARE_GIVEN else drawn)
    damaged = {source.path if rng.random() < 0.7 else rng.choice(source.files)}
    if len(source.files) > 1 and rng.random() < 0.2:
        damaged.add(rng.choice(source.files))
    place = folder / str(number)
    (place / "slide").mkdir(parents=True)
    operations: list[str] = []
    for path in source.files:
        data = path.read_bytes()
        if path in damaged:
            data, done = damage(rng, data)
            operations += [f"{path.name}: {what}" for what in done]
        (place / "slide" / path.name).write_bytes(data)
    return Case(number, source, tuple(operations), place)


def kept_cases(kept: Path, folder: Path) -> Iterator[Case]:
    """Cases that ``keep_case`` has kept, unchanged."""
    for note in sorted(kept.glob("*/case.json")):
        said = json.loads(note.read_text())
        place = folder / note.parent.name
        shutil.copytree(note.parent, place / "slide", ignore=shutil.ignore_patterns(note.name))
        source = Source(said["source"].split()[0], said["source"], note.parent / said["opened"])
        yield Case(said["number"], source, tuple(said["operations"]), place)


def run_cases(
    cases: Iterable[Case], seed: int, folder: Path, processes: int, limits: Limits, always_predict: bool = False
) -> Iterator[Verdict]:
    """Outcomes of the cases, in the order in which they end; a case's folder is removed when the next is asked for."""
    waiting: dict[Path, Case] = {}

    def tasks() -> Iterator[Task]:
        for case in cases:
            work = case.folder / "work"
            work.mkdir()
            predict = always_predict or Random(f"{seed}/{case.number}/predict").random() < SHARE_PREDICTED
            waiting[case.path] = case
            yield case.path, work, seed + case.number, predict

    for result in run_tasks(examined, tasks(), folder, processes, limits, ("fuzz_examination",)):
        case = waiting.pop(result.task[0])
        yield verdict_on(case, result)
        shutil.rmtree(case.folder)


def examined(task: Task) -> tuple[str, str, str]:
    """Outcome, stage and detail; only here, in the processes that examine, is torch loaded."""
    from fuzz_examination import Examination, examine

    finding = examine(Examination(*task))
    return finding.outcome, finding.stage, finding.detail


def verdict_on(case: Case, result: Result) -> Verdict:
    seconds = result.processor_s, result.wall_s
    if result.downfall:
        outcome = result.downfall.partition(":")[0]
        if "failed to allocate" in result.log:
            outcome = "memory"
        return Verdict(case, outcome, "", f"{result.downfall}\n{result.log}", *seconds)
    return Verdict(case, *result.returned, *seconds)


def keep_case(verdict: Verdict, seed: int, folder: Path) -> None:
    """Copy the damaged files beside a note of what they are and what came of them."""
    case = verdict.case
    place = folder / f"{seed}_{case.number}"
    shutil.copytree(case.folder / "slide", place, dirs_exist_ok=True)
    note = {
        "seed": seed,
        "number": case.number,
        "source": case.source.name,
        "opened": case.path.name,
        "operations": case.operations,
    }
    note |= {"outcome": verdict.outcome, "stage": verdict.stage, "detail": verdict.detail}
    (place / "case.json").write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n")


def table(verdicts: list[Verdict], by: str) -> str:
    """Counts of outcomes, in one row per kind or per slide."""
    names = {"kind": lambda verdict: verdict.case.source.kind, "slide": lambda verdict: verdict.case.source.name}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        counts[names[by](verdict)][verdict.outcome] += 1
    rows = [(name, counts[name]) for name in (KINDS if by == "kind" else sorted(counts)) if name in counts]
    if by == "kind":
        rows.append(("all", sum(counts.values(), Counter())))
    lines = [f"| {by} | files | {' | '.join(OUTCOMES)} |", f"|---|{'---:|' * (len(OUTCOMES) + 1)}"]
    lines += [
        f"| {name} | {count.total()} | {' | '.join(str(count[outcome]) for outcome in OUTCOMES)} |"
        for name, count in rows
    ]
    return "\n".join(lines)


def faults_in_words(verdicts: list[Verdict]) -> str:
    """The faults, those with the same words together, with the numbers of their files."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.outcome in FAULTS:
            words = re.sub(r"'/[^']*'|/\S+", "PATH", verdict.detail)
            groups[f"{verdict.outcome}, {verdict.stage}: {re.sub(r'0x[0-9a-f]+|[0-9]+', '#', words)}"].append(verdict)
    lines = []
    for members in sorted(groups.values(), key=len, reverse=True):
        first = members[0]
        numbers = ", ".join(str(member.case.number) for member in members[:8])
        lines.append(
            f"{len(members)} x {first.outcome} at {first.stage or 'an unknown stage'}, numbers {numbers}, e.g. "
            f"{first.case.source.name}: {'; '.join(first.case.operations)}\n    "
            + first.detail[:1500].replace("\n", "\n    ")
        )
    return "\n".join(lines)


def contained(verdicts: list[Verdict]) -> str:
    number = sum("crash" in verdict.detail for verdict in verdicts if verdict.outcome in FINE)
    return f"In {number} of the files a decoder crashed in a process of its own, and the message says so."


def report(verdicts: list[Verdict], arguments: argparse.Namespace, given: list[Source], seconds: float) -> str:
    """The run, its machine and its outcome, as a page of ``bench/results``."""
    command = f"python tests/slide/fuzz_files.py --files {len(verdicts)} --seed {arguments.seed}"
    command += " --given SLIDES" if given else ""
    versions = [f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in VERSIONED)]
    return f"""# Damaged slide files

{date.today()}, `{command}`; {", ".join(versions)}.

{REPORTED}

{table(verdicts, "kind")}

{contained(verdicts)} {slowest(verdicts)} All took {seconds / 60:.0f} minutes on {arguments.processes} of
{os.cpu_count()} cores.

{table(verdicts, "slide")}
"""


def slowest(verdicts: list[Verdict]) -> str:
    by_time = sorted(verdicts, key=lambda verdict: -verdict.processor_s)[:5]
    said = ", ".join(f"{v.processor_s:.1f} s ({v.case.source.name}, {v.case.number})" for v in by_time)
    return f"Most processor time: {said}; longest wall time {max(v.wall_s for v in verdicts):.1f} s."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100, help="how many damaged files")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="these numbers alone, each predicted too, and kept")
    parser.add_argument("--again", type=Path, help="in place of new files those that --keep has kept in this folder")
    parser.add_argument("--given", type=Path, nargs="*", default=[], help="slides of yours, or folders of them")
    parser.add_argument("--keep", type=Path, help="folder for the files that show a fault")
    parser.add_argument("--report", type=Path, help="a page of Markdown for the counts, written anew every minute")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="processor time that a file may take")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    given = [path for path in arguments.given if path.exists()]
    verdicts: list[Verdict] = []
    started = shown = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz_files_") as name:
        folder = Path(name)
        real = given_sources(given)
        sources = draw_sources(folder / "sources") + real
        numbers = arguments.only or range(arguments.first, arguments.first + arguments.files)
        if arguments.again:
            cases = kept_cases(arguments.again, folder / "cases")
        else:
            cases = (make_case(number, arguments.seed, sources, folder / "cases") for number in numbers)
        limits = Limits(arguments.seconds, 10 * arguments.seconds)
        thorough = bool(arguments.only or arguments.again)
        for verdict in run_cases(cases, arguments.seed, folder, arguments.processes, limits, thorough):
            verdicts.append(verdict)
            if arguments.keep and (verdict.outcome in FAULTS or arguments.only):
                keep_case(verdict, arguments.seed, arguments.keep)
            if thorough:
                operations = "\n  ".join(verdict.case.operations)
                print(f"{verdict.case.number}: {verdict.case.source.name}\n  {operations}")
                print(f"  {verdict.outcome} ({verdict.stage}), {verdict.processor_s:.1f} s: {verdict.detail}")
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                counts = Counter(verdict.outcome for verdict in verdicts)
                print(f"{len(verdicts)}: {dict(counts)}", file=sys.stderr)
                if arguments.report:
                    arguments.report.write_text(report(verdicts, arguments, real, time.monotonic() - started))
    print(f"{table(verdicts, 'kind')}\n\n{table(verdicts, 'slide')}\n\n{contained(verdicts)}")
    seconds = time.monotonic() - started
    print(f"{slowest(verdicts)}\n{len(verdicts)} files in {seconds:.0f} s.\n\n{faults_in_words(verdicts)}")
    if arguments.report:
        arguments.report.write_text(report(verdicts, arguments, real, seconds))
    return int(any(verdict.outcome in FAULTS for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
