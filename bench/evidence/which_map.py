"""Experiments on the last attention row that show why maps differ, written into docs/which_map.md.

    python -m bench.evidence.which_map --real DIR  # GlaS's training images, photographs, digits, synthetic slides

Every row of the tables changes one thing in CDAM. Its value is the contrast between the tokens that show the class and
those that do not (−1 … 1), mean ± standard error over images. GlaS's test folder is not read. The small models of
digits and slides are trained here, several of each from different seeds; their standard error is over trainings, each
represented by the mean over its images. Models and results are cached.

Dimension key: B images, H·W grid tokens, C channels.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import maskattn.explain
from bench.evidence.digits import TRAINING_DIGITS, compose, load_glyphs
from bench.evidence.digits import new_model as new_digits_model
from bench.evidence.digits import train as train_digits
from bench.evidence.real_images import composites, crops, normalised, photographs, text_head
from bench.evidence.real_judging import drops_of, features_of, gathered, in_bfloat16
from bench.evidence.real_probes import Probes
from bench.evidence.real_rows import STRENGTH
from bench.evidence.real_weights import ENCODERS, load_encoder, missing
from bench.evidence.row_experiments import Reading, experiments, facts
from bench.evidence.slides import Slides, draw_slides, for_lesion
from bench.evidence.slides import new_model as new_slides_model
from bench.evidence.slides import train as train_slides
from bench.evidence.table import mean_and_error, write_section
from maskattn.explain.metrics import object_contrast
from maskattn.files import replacing
from maskattn.nn import VisionTransformer

_EXPLAIN = Path(maskattn.explain.__file__).parent
_DROPPED = (
    "CDAM",
    "its value term alone",
    "dropped from the row, first order",
    "path of values",
    "path of T (norm)",
    "path of T, told in weights",
    "attention",
)


@dataclass(frozen=True)
class Case:
    """One image and class.

    Attributes:
        reading: its last attention row.
        own_HW, other_HW: (H, W) bool, tokens that show the class, and tokens that do not.
        others: targets to try instead of the reading's own.
        keep_N: (N,) bool, grid tokens that take part.
    """

    reading: Reading
    own_HW: Tensor
    other_HW: Tensor
    others: dict[str, Callable[[Tensor], Tensor]]
    keep_N: Tensor


def read(
    model: VisionTransformer,
    image_1IXY: Tensor,
    areas: tuple[Tensor, Tensor],
    targets: Sequence[tuple[str, Callable[[Tensor], Tensor]]],
    keep_1HW: Tensor | None = None,
) -> Case:
    """Build the case of an image; the first target is explained, the others are tried in its place."""
    with torch.no_grad():
        tokens = model.before_last_block(model.embed(image_1IXY, keep_1HW))
    kept = torch.ones_like(areas[0]) if keep_1HW is None else keep_1HW[0]
    return Case(Reading(model, tokens, targets[0][1]), *areas, dict(targets[1:]), kept.flatten())


def photograph_cases(real: Path, model: VisionTransformer, encoder: str, count: int) -> Iterator[Case]:
    """Yield the cases of pictures of two animals, each explained by its logit among 171 texts."""
    pictures = photographs(real)
    text_KC, classes = text_head(real, model.projection)
    images = normalised(pictures.pixels_B3XY, ENCODERS[encoder].mean, ENCODERS[encoder].std)
    areas = pictures.areas(model.patch_embed.grid_of(images))

    def logits(z: Tensor) -> Tensor:
        return 100 * (z @ text_KC.T) / (z @ model.projection.T).norm(dim=1, keepdim=True)

    for i, animals in list(enumerate(pictures.classes))[:count]:
        for which, name in enumerate(animals):
            k = classes.index(name)
            targets = (
                ("raw logit", lambda z, k=k: logits(z)[:, k]),
                ("log-probability", lambda z, k=k: logits(z).log_softmax(dim=1)[:, k]),
                ("probability", lambda z, k=k: logits(z).softmax(dim=1)[:, k]),
                ("logit less the classes' mean", lambda z, k=k: logits(z)[:, k] - logits(z).mean(dim=1)),
            )
            yield read(model, images[i : i + 1], (areas[i, which], areas[i, 1 - which]), targets)


def tissue_cases(real: Path, model: VisionTransformer, encoder: str, count: int, cache: Path) -> Iterator[Case]:
    """Yield composites of benign and malignant tissue from training images; the probe has seen neither patient."""
    training, how = crops(real, "train"), ENCODERS[encoder]
    features = features_of(model, normalised(training.pixels_B3XY, how.mean, how.std), cache)
    probes = Probes(features, training.malignant_B, training.patients, STRENGTH[encoder])
    pairs = composites(training, count, seed=0)
    areas = pairs.areas(model.patch_embed.grid_of(pairs.pixels_B3XY))
    for i, image in enumerate(normalised(pairs.pixels_B3XY, how.mean, how.std).split(1)):
        weight, bias = probes.without(pairs.patients[i])
        targets = (
            ("raw logit", lambda z, w=weight, b=bias: z @ w + b),
            ("log-probability", lambda z, w=weight, b=bias: F.logsigmoid(z @ w + b)),
            ("probability", lambda z, w=weight, b=bias: torch.sigmoid(z @ w + b)),
        )
        yield read(model, image, (areas[i, 0], areas[i, 1]), targets)


def digit_cases(folder: Path, count: int, steps: int, seed: int) -> Iterator[Case]:
    """Yield scenes of two digits on texture, explained by the left one's logit; trains a model of three blocks."""
    path = folder / f"digits_{steps}_{seed}.pt"
    if not path.exists():
        torch.save(train_digits(steps, seed).state_dict(), path)
    model = new_digits_model(0)
    model.load_state_dict(torch.load(path, weights_only=True))
    model.requires_grad_(False)
    glyphs, labels = (x[TRAINING_DIGITS:] for x in load_glyphs())
    scenes = compose(glyphs, labels, count, seed=7)
    for i, (left, _) in enumerate(scenes.classes_B2.tolist()):
        targets = (
            ("raw logit", lambda z, k=left: z[:, k]),
            ("log-probability", lambda z, k=left: F.logsigmoid(z[:, k])),
            ("probability", lambda z, k=left: torch.sigmoid(z[:, k])),
            ("logit less the classes' mean", lambda z, k=left: z[:, k] - z.mean(dim=1)),
        )
        yield read(model, scenes.images_BIXY[i : i + 1], (scenes.areas_B2HW[i, 0], scenes.areas_B2HW[i, 1]), targets)


@functools.cache
def _drawn_slides(first_seed: int, count: int) -> Slides:
    return draw_slides(first_seed, count, "low")


def slide_cases(folder: Path, count: int, steps: int, seed: int) -> Iterator[Case]:
    """Yield entire synthetic slides, masked: a lesion against the other tissue; trains a model of three blocks."""
    path = folder / f"synthetic_slides_{steps}_{seed}.pt"
    if not path.exists():
        torch.save(train_slides(_drawn_slides(0, 300), True, 0.0, seed, steps).state_dict(), path)
    model = new_slides_model()
    model.load_state_dict(torch.load(path, weights_only=True))
    model.requires_grad_(False)
    slides = _drawn_slides(500_001, 2 * count)
    images = slides.images(torch.zeros(len(slides.label_B), dtype=torch.bool))
    for i in slides.label_B.nonzero()[:count, 0].tolist():
        keep = slides.keep_BHW[i : i + 1]
        areas = slides.lesion_BHW[i], keep[0] & ~slides.lesion_BHW[i]
        targets = (
            ("raw logit", for_lesion),
            ("log-probability", lambda z: z.log_softmax(dim=1)[:, 1]),
            ("probability", lambda z: z.softmax(dim=1)[:, 1]),
        )
        yield read(model, images[i : i + 1], areas, targets, keep)


def judge(cases: Iterator[Case]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the contrast of every experiment and the facts of every row, one value for each image."""
    contrast: dict[str, list[float]] = {}
    known: dict[str, list[float]] = {}
    for case in cases:
        for name, values in experiments(case.reading, case.others).items():
            grid = torch.zeros(len(case.keep_N)).masked_scatter(case.keep_N, values)
            value = object_contrast(grid.view(1, *case.own_HW.shape), case.own_HW[None], case.other_HW[None])
            contrast.setdefault(name, []).append(float(value))
        for name, number in facts(case.reading).items():
            known.setdefault(name, []).append(number)
    return {k: torch.tensor(v) for k, v in contrast.items()}, {k: torch.tensor(v) for k, v in known.items()}


def kept(folder: Path, what: str, cases: Iterator[Case]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the cached results of these cases, under a digest of the sources that they depend on."""
    digest = hashlib.sha1(what.encode())
    for path in sorted([Path(__file__), *Path(__file__).parent.glob("row_experiments.py"), *_EXPLAIN.glob("*.py")]):
        digest.update(path.read_bytes())
    path = folder / f"which_{digest.hexdigest()[:16]}.pt"
    if not path.exists():
        with replacing(path) as partial:
            torch.save(judge(cases), partial)
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = torch.load(path, weights_only=True)
    return found


def drop_cases(
    real: Path, model: VisionTransformer, encoder: str, count: int, cache: Path
) -> Iterator[dict[str, float]]:
    """Yield the correctness by dropping tokens of single squares of training tissue, for some experiments."""
    training, how = crops(real, "train"), ENCODERS[encoder]
    features = features_of(model, normalised(training.pixels_B3XY, how.mean, how.std), cache)
    probes, judging = Probes(features, training.malignant_B, training.patients, STRENGTH[encoder]), in_bfloat16(model)
    order = torch.randperm(len(training.names), generator=torch.Generator().manual_seed(4))
    for i in order[:count].tolist():
        image = normalised(training.pixels_B3XY[i : i + 1], how.mean, how.std)
        weight, bias = probes.without([training.patients[i]])
        sign = 1 if training.malignant_B[i] else -1

        def target(z: Tensor, w: Tensor = weight, b: Tensor = bias, s: int = sign) -> Tensor:
            return s * (z @ w + b)

        grid_HW = model.patch_embed.grid_of(image)
        nowhere = torch.zeros(grid_HW, dtype=torch.bool)
        found = experiments(read(model, image, (nowhere, nowhere), [("raw logit", target)]).reading, {})
        maps = {name: found[name].view(1, *grid_HW) for name in _DROPPED}
        maps["random"] = torch.randn(1, *grid_HW, generator=torch.Generator().manual_seed(i))
        yield drops_of(judging, image, maps, target)


def by_columns(columns: dict[str, dict[str, Tensor]], with_right_side: bool) -> str:
    """Return a table with a row for each experiment and a column for each set: mean ± standard error, share above 0.

    Values are (B,) over images, or (S, B) over images for each of S trainings.
    """
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = []
        for column in columns.values():
            if name not in column:
                cells.append("")
                continue
            mean, error = mean_and_error(column[name] if column[name].ndim == 1 else column[name].mean(dim=1))
            right = f" ({float((column[name] > 0).double().mean()):.0%})" if with_right_side else ""
            cells.append(f"{mean:.3f} ± {error:.3f}{right}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run every experiment on every set that is present, and write the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, help="folder of real material; without it the toy sets alone")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "maskattn-evidence")
    parser.add_argument("--page", type=Path, default=Path("docs/which_map.md"))
    parser.add_argument("--sets", nargs="+", default=["CLIP", "DINOv2", "digits", "slides"], help="some of them")
    parser.add_argument("--seeds", type=int, default=4, help="trainings of each small model")
    parser.add_argument("--images", type=int, default=40, help="of each set")
    parser.add_argument("--dropped", type=int, default=8, help="squares of tissue whose tokens are dropped")
    parser.add_argument("--steps", type=int, nargs=2, default=(1500, 500), help="training steps: digits, slides")
    parser.add_argument("--quick", action="store_true", help="a trial on two images, which writes no page")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    count = 2 if arguments.quick else arguments.images
    contrast, known = {}, {}
    for name, trainings in _sets(arguments, count):
        judged = [kept(arguments.cache, f"{name}, {count}, {i}", cases) for i, cases in enumerate(trainings)]
        contrast[name], known[name] = (joined([one[i] for one in judged]) for i in range(2))
        print(f"{name}: {counted(contrast[name])}", flush=True)
    dropped = {}
    for encoder in ENCODERS if arguments.real is not None and (arguments.real / "glas").is_dir() else ():
        if encoder.split()[0] in arguments.sets and missing(encoder, arguments.cache) is None:
            if not arguments.dropped:
                continue
            model, squares = load_encoder(encoder, arguments.cache), 1 if arguments.quick else arguments.dropped
            rows = list(drop_cases(arguments.real, model, encoder, squares, arguments.cache))
            dropped[f"{encoder}, {squares} squares"] = {name: gathered(rows, name) for name in rows[0]}
    counts = ", ".join(f"{name}: {counted(x)}" for name, x in contrast.items())
    tables = {
        "experiments": f"Maps judged: {counts}. In brackets the share with a contrast above 0.\n\n"
        + by_columns(contrast, with_right_side=True),
        "rows": by_columns(known, with_right_side=False),
        **({"dropping": by_columns(dropped, with_right_side=False)} if dropped else {}),
    }
    for name, text in tables.items():
        print(text, flush=True)
        if not arguments.quick:
            write_section(arguments.page, name, text)


def joined(of_trainings: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the results of trainings: (B,) for one model, (S, B) for S trainings."""
    if len(of_trainings) == 1:
        return of_trainings[0]
    return {name: torch.stack([one[name] for one in of_trainings]) for name in of_trainings[0]}


def counted(values: dict[str, Tensor]) -> str:
    """Return the number of maps in words."""
    shape = next(iter(values.values())).shape
    return f"{shape[0]}" if len(shape) == 1 else f"{shape[1]} by each of {shape[0]} trainings"


def _sets(arguments: argparse.Namespace, count: int) -> Iterator[tuple[str, list[Iterator[Case]]]]:
    real, cache = arguments.real, arguments.cache
    for encoder in ENCODERS if real is not None else ():
        if encoder.split()[0] not in arguments.sets:
            continue
        why = missing(encoder, cache)
        if why is not None:
            print(f"skipped: {encoder}, {why}", flush=True)
            continue
        model = load_encoder(encoder, cache)
        if encoder.startswith("CLIP") and (real / "photos").is_dir():
            yield f"photographs, {encoder}", [photograph_cases(real, model, encoder, count)]
        if (real / "glas").is_dir():
            yield f"colon tissue, {encoder}", [tissue_cases(real, model, encoder, count, cache)]
    seeds = range(1 if arguments.quick else arguments.seeds)
    if "digits" in arguments.sets:
        steps = arguments.steps[0]
        yield "two digits, a small ViT", [digit_cases(cache, count, steps, seed) for seed in seeds]
    if "slides" in arguments.sets:
        steps = arguments.steps[1]
        yield "synthetic slides, a small ViT", [slide_cases(cache, count, steps, seed) for seed in seeds]


if __name__ == "__main__":
    main()
