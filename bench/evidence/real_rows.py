"""The rows of the evidence tables: the images on which maps are judged, and every measure of each.

Each image is explained by the methods that cost about one prediction, and some also by those that cost tens or
hundreds, in separate rows that come last. All methods share one pass of the backbone.

Dimension key: B images, H·W grid tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.evidence.real_images import Crops, composites, crops, normalised, photographs, text_head
from bench.evidence.real_judging import (
    SLOW,
    Target,
    boxes_of,
    compactness_of,
    contrasts,
    drops_of,
    features_of,
    in_bfloat16,
    likeness_of,
    maps_of,
    precision_of,
    remembering,
)
from bench.evidence.real_probes import Probes, leave_one_patient_out
from bench.evidence.real_progress import Progress
from bench.evidence.real_weights import ENCODERS
from maskattn.nn import VisionTransformer

__all__ = ["QUICK", "STRENGTH", "Counts", "Judged", "logit", "photograph_rows", "tissue_rows"]

# Inverse penalty of the probes, the best of four values by leave-one-patient-out validation.
STRENGTH = {"CLIP ViT-B/16": 0.01, "DINOv2 ViT-S/14": 1.0}
SEEDS = (1, 2)  # seeds of the composites, half of them from each
_CONTRAST, _DROP, _BOX = "contrast", "correctness, drop", "box sensitivity"
_GLAND, _COMPACT, _LIKE = "gland AP", "compactness", "correlation with token ablation"

Measures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Counts:
    """The number of images of each kind; ``slow`` counts those for methods that need many predictions."""

    composites: int = 40
    squares: int = 40
    dropped: int = 12
    boxed: int = 6
    boxes: int = 60
    slow: int = 4
    slides: int = 4


QUICK = Counts(composites=2, squares=2, dropped=1, boxed=1, boxes=4, slow=0, slides=1)


@dataclass(frozen=True)
class Judged:
    """The rows of one part of the evidence.

    Attributes:
        rows: measure → method → value, for each image.
        probe: the probe's accuracy and area under the ROC curve; None without a probe.
        minutes: processor minutes.
    """

    rows: list[Measures]
    probe: tuple[float, float] | None
    minutes: float

    def measure(self, name: str) -> list[dict[str, float]]:
        """Return the values of a measure from the rows that have it."""
        return [row[name] for row in self.rows if row.get(name)]


@dataclass(frozen=True)
class _Judge:
    """An encoder, which computes an image's maps and their measures."""

    model: VisionTransformer
    in_bfloat16: VisionTransformer
    names: Sequence[str]
    counts: Counts

    @classmethod
    def of(cls, model: VisionTransformer, names: Sequence[str], counts: Counts) -> _Judge:
        return cls(remembering(model), in_bfloat16(model), names, counts)

    def measures(
        self,
        image: Tensor,
        target: Target,
        slow: bool,
        areas: tuple[Tensor, Tensor] | None = None,
        glands: Tensor | None = None,
        single: int | None = None,
    ) -> Measures:
        """Compute every measure of the quick methods' maps, or of the slow ones'.

        Args:
            image: (1, 3, X, Y).
            target: the score.
            slow: whether the slow methods are judged.
            areas: the tokens that show the class, and those that show the other.
            glands: the tokens that a map should find.
            single: the image's index among those that are judged by dropping and by boxes; None if it is not one.
        """
        judge, counts = self.in_bfloat16, self.counts
        quick = [name for name in self.names if name not in SLOW]
        compared = single is not None and slow and "token-ablation" in self.names
        asked = [name for name in self.names if name in SLOW] if slow else quick
        maps = maps_of(self.model, judge, image, target, [*asked, *(quick if compared else ())])
        found: Measures = {_LIKE: likeness_of(maps)} if compared else {}
        if slow:
            maps = {name: maps[name] for name in asked}
        if areas is not None:
            found[_CONTRAST] = contrasts(maps, *areas)
        if single is not None:
            found[_COMPACT] = compactness_of(maps)
            if glands is not None:
                found[_GLAND] = precision_of(maps, glands)
            if single < counts.dropped:
                found[_DROP] = drops_of(judge, image, maps, target)
            if single < counts.boxed:
                found[_BOX] = boxes_of(judge, image, maps, target, counts.boxes)
        return found


Task = tuple[str, Callable[[bool], Measures]]


def _judged(progress: Progress, tasks: Sequence[tuple[Task, bool]], probe: tuple[float, float] | None) -> Judged:
    """Compute the rows of all tasks by the quick methods, then of the marked ones by the slow methods."""
    rows = []
    for slow in (False, True):
        for (key, make), also_slow in tasks:
            if not slow or also_slow:
                rows.append(progress.row(f"{key}{', slow' if slow else ''}", lambda make=make, slow=slow: make(slow)))
    return Judged(rows, probe, progress.seconds / 60)


def photograph_rows(
    real: Path, cache: Path, encoder: str, model: VisionTransformer, names: Sequence[str], counts: Counts
) -> Judged:
    """Judge pictures of two animals by each animal's log-probability among 171 texts."""
    pictures = photographs(real)
    text_KC, classes = text_head(real, model.projection)
    areas = pictures.areas(model.patch_embed.grid_of(pictures.pixels_B3XY))
    images = normalised(pictures.pixels_B3XY, ENCODERS[encoder].mean, ENCODERS[encoder].std)
    judge, tasks = _Judge.of(model, names, counts), []
    for i, animals in list(enumerate(pictures.classes))[: counts.composites]:
        for which, name in enumerate(animals):

            def target(z: Tensor, index: int = classes.index(name)) -> Tensor:
                projected = (z @ model.projection.T).norm(dim=1, keepdim=True)
                return (100 * (z @ text_KC.T) / projected).log_softmax(dim=1)[:, index]

            def make(slow: bool, i: int = i, which: int = which, target: Target = target) -> Measures:
                own, other = areas[i, which], areas[i, 1 - which]
                return judge.measures(images[i : i + 1], target, slow, (own, other), single=2 * i + which)

            tasks.append(((f"{pictures.names[i]}, {name}", make), i < counts.slow // 2))
    return _judged(Progress(cache, "photographs", _terms(encoder, names, counts)), tasks, None)


def tissue_rows(
    real: Path, cache: Path, encoder: str, model: VisionTransformer, names: Sequence[str], counts: Counts
) -> Judged:
    """Judge composites of benign and malignant tissue, and single squares, from the test folder."""
    how, progress = ENCODERS[encoder], Progress(cache, "tissue", _terms(encoder, names, counts))
    training, test = crops(real, "train"), crops(real, "test")
    features = features_of(model, normalised(training.pixels_B3XY, how.mean, how.std), cache)
    probes = Probes(features, training.malignant_B, training.patients, STRENGTH[encoder])
    judge, tasks = _Judge.of(model, names, counts), []
    for seed in SEEDS:
        pairs = composites(test, -(-counts.composites // len(SEEDS)), seed=seed)
        areas = pairs.areas(model.patch_embed.grid_of(pairs.pixels_B3XY))
        for i, image in enumerate(normalised(pairs.pixels_B3XY, how.mean, how.std).split(1)):

            def of_composite(
                slow: bool,
                image: Tensor = image,
                patients: tuple[str, str] = pairs.patients[i],
                own_and_other: Tensor = areas[i],
            ) -> Measures:
                own, other = own_and_other.unbind()
                return judge.measures(image, logit(*probes.without(patients), 1), slow, (own, other))

            tasks.append(((f"composite {seed}.{i}", of_composite), i < counts.slow // len(SEEDS)))
    for index, (i, image, target) in enumerate(_squares(test, probes, how.mean, how.std, counts.squares)):

        def of_square(
            slow: bool, i: int = i, index: int = index, image: Tensor = image, target: Target = target
        ) -> Measures:
            glands = test.glands(model.patch_embed.grid_of(image))[i]
            return judge.measures(image, target, slow, glands=glands, single=index)

        tasks.append(((f"square {test.names[i]}", of_square), index < counts.slow))
    return _judged(progress, tasks, leave_one_patient_out(probes))


def logit(weight_C: Tensor, bias: Tensor, sign: int) -> Target:
    """Return the malignant logit as a target, or the benign one for a sign of −1."""
    return lambda z: sign * (z @ weight_C + bias)


def _squares(
    test: Crops, probes: Probes, mean: tuple[float, ...], std: tuple[float, ...], count: int
) -> Iterator[tuple[int, Tensor, Target]]:
    """Yield one square of each test image in a fixed random order, with the target of its own class."""
    first = torch.arange(0, len(test.names), 2)
    for i in first[torch.randperm(len(first), generator=torch.Generator().manual_seed(3))][:count].tolist():
        image = normalised(test.pixels_B3XY[i : i + 1], mean, std)
        yield i, image, logit(*probes.without([test.patients[i]]), 1 if test.malignant_B[i] else -1)


def _terms(encoder: str, names: Sequence[str], counts: Counts) -> str:
    return f"{encoder} {sorted(names)} {counts.boxes} {counts.dropped} {counts.boxed}"
