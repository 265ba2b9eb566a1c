"""Pictures of the grading experiment: the cohort, and plain and masked maps of a slide of the other centre."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.evidence.cohort import GRADES, draw_cohort, draw_slide
from bench.evidence.figures import lay_over
from bench.evidence.grading_arms import ARMS, MAIN, Bench
from bench.evidence.grading_maps import MAPS, maps_of_slide
from bench.evidence.grading_model import Plan, hipt_of

__all__ = ["draw_cohort_picture", "draw_map_picture"]

_SHOWN = (MAPS[0], MAPS[1], MAPS[4], MAPS[5])


def _save(figure: Figure, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def draw_cohort_picture(path: Path) -> None:
    """Draw a row for each grade: the planted patterns, the slide inside the centre, the same tissue outside it."""
    colours = np.array([(255, 255, 255), (60, 60, 60), (200, 200, 200), (255, 190, 60), (200, 30, 40)], np.uint8)
    figure = Figure(figsize=(7.2, 1.62 * GRADES + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(GRADES, 3, squeeze=False)
    for grade in range(GRADES):
        inside, kinds = draw_slide(100 + grade, grade, "inside", marks_tell=True)
        outside, _ = draw_slide(100 + grade, grade, "outside", marks_tell=False)
        for axis, image in zip(axes[grade], (colours[kinds], inside, outside), strict=True):
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[grade, 0].set_ylabel(f"grade {grade}", fontsize=8)
    for axis, title in zip(axes[0], ("planted", "inside the centre", "outside"), strict=True):
        axis.set_title(title, fontsize=9)
    _save(figure, path, 110)


def draw_map_picture(folder: Path, path: Path, plan: Plan, seed: int) -> None:
    """Draw maps of a grade above 0 for a slide of grade 3 from outside: plain in the first row, masked in the second.

    Args:
        folder: folder of a run, whose weights are read.
        path: path of the picture.
        plan: plan of the run.
        seed: seed of the weights.
    """
    bench = Bench(seed, plan, folder / f"seed{seed}")
    cohort = draw_cohort(7, 4, "outside", marks_tell=False)
    slide = int(np.flatnonzero(cohort.grades_S == GRADES // 2)[0])
    image, tissue = cohort.images_S3XY[slide], cohort.tissue[slide]
    truth = cohort.pattern("pattern A", "pattern B")[slide]
    figure = Figure(figsize=(2.4 * (len(_SHOWN) + 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(_SHOWN) + 1, squeeze=False)
    axes[0, 0].imshow(image.transpose(1, 2, 0))
    lay_over(axes[1, 0], image.mean(axis=0), truth.astype(float), signed=False)
    for row, arm in enumerate(a for a in ARMS if a.name in MAIN):
        model = hipt_of(bench.encoder(arm), bench.upper_levels(arm))
        keep = torch.from_numpy(tissue if arm.inference.tokens else np.ones_like(tissue))
        maps = maps_of_slide(model, torch.from_numpy(image), keep)
        for axis, name in zip(axes[row, 1:], _SHOWN, strict=True):
            values = maps[name][0].numpy()
            lay_over(axis, image.mean(axis=0), values, bool((values < 0).any()))
            axis.set_title(name.replace(", three", ",\nthree") + f"\n{arm.name}", fontsize=8)
    axes[0, 0].set_title("slide from outside", fontsize=8)
    axes[1, 0].set_title("lesion", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    _save(figure, path, 100)
