"""Explanations judged on real encoders, real photographs and real tissue.

    python -m bench.evidence.real --real DIR            # writes the first part of docs/evidence.md
    python -m bench.evidence.real --real DIR --quick    # two images of each kind, a trial of the bench alone

DIR holds material that cannot be kept with the package (real_images.py says what); what is not there is skipped by
name. Probes are trained on GlaS's training images, without the patients that they are asked about; its test folder
is read here and nowhere else. Seeded; at full counts within forty minutes on two cores.

Dimension key: B images, H·W grid tokens, C channels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench.evidence.real_glass import attention_on_glass, edge_crops
from bench.evidence.real_images import Crops, composites, crops, normalised, photographs, text_head
from bench.evidence.real_judging import (
    SLOW,
    Target,
    boxes_of,
    contrasts,
    drops_of,
    features_of,
    gathered,
    in_bfloat16,
    maps_of,
    precision_of,
    remembering,
)
from bench.evidence.real_probes import Probes, leave_one_patient_out
from bench.evidence.real_slide import judge_slides
from bench.evidence.real_weights import ENCODERS, load_encoder, missing
from bench.evidence.table import Row, markdown_table, write_section
from maskattn.explain import METHODS
from maskattn.nn import VisionTransformer

STRENGTH = {"CLIP ViT-B/16": 0.01, "DINOv2 ViT-S/14": 1.0}  # of the probes, the best of four leaving one patient out
HIGHER = ("contrast", "right side", "correctness", "box", "gland")


@dataclass(frozen=True)
class Counts:
    """How many images of each kind; ``slow`` of them for methods that take many predictions."""

    composites: int = 40
    squares: int = 40
    dropped: int = 12
    boxed: int = 6
    boxes: int = 60
    slow: int = 4
    slides: int = 4


QUICK = Counts(composites=2, squares=2, dropped=1, boxed=1, boxes=4, slow=0, slides=1)


def table_of(measures: dict[str, Sequence[dict[str, float]]], names: Sequence[str]) -> str:
    """A row for each method, a column for each measure."""
    rows = []
    for name in [*names, "random"]:
        title = METHODS[name].title if name in METHODS else name
        rows.append(Row(title, {key: gathered(values, name) for key, values in measures.items()}))
    return markdown_table(rows, HIGHER)


def right_side(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """1 where the contrast is above 0."""
    return [{name: float(value > 0) for name, value in row.items()} for row in rows]


def judge_photographs(real: Path, model: VisionTransformer, names: Sequence[str], counts: Counts, clip: str) -> str:
    """Two animals in a picture: each one's log-probability among 171 texts."""
    pictures = photographs(real)
    text_KC, classes = text_head(real, model.projection)
    areas = pictures.areas(model.patch_embed.grid_of(pictures.pixels_B3XY))
    images = normalised(pictures.pixels_B3XY, ENCODERS[clip].mean, ENCODERS[clip].std)
    explained, judge = remembering(model), in_bfloat16(model)
    contrast, drops, boxes = [], [], []
    for i, pair in list(enumerate(pictures.classes))[: counts.composites]:
        for side, name in enumerate(pair):

            def target(z: Tensor, index: int = classes.index(name)) -> Tensor:
                projected = (z @ model.projection.T).norm(dim=1, keepdim=True)
                return (100 * (z @ text_KC.T) / projected).log_softmax(dim=1)[:, index]

            of_image = [*names, *(SLOW if i < counts.slow // 2 else ())]
            maps = maps_of(explained, images[i : i + 1], target, of_image)
            contrast.append(contrasts(maps, areas[i, side], areas[i, 1 - side]))
            if len(drops) < counts.dropped:
                drops.append(drops_of(judge, images[i : i + 1], maps, target))
            if len(boxes) < counts.boxed:
                boxes.append(boxes_of(judge, images[i : i + 1], maps, target, counts.boxes))
    measures = {
        "contrast": contrast,
        "right side": right_side(contrast),
        "correctness, drop": drops,
        "box sensitivity": boxes,
    }
    said = [*names, *(SLOW if counts.slow else ())]
    return (
        f"### Two animals in a photograph, {clip}\n\n{len(contrast)} maps of {len(contrast) // 2} photographs, the "
        f"animal's log-probability; {len(drops)} of them by dropping, {len(boxes)} by {counts.boxes} boxes.\n\n"
        + table_of(measures, said)
    )


def judge_glas(
    real: Path, cache: Path, encoder: str, model: VisionTransformer, names: Sequence[str], counts: Counts
) -> str:
    """Benign beside malignant tissue, and the glands of single squares."""
    how = ENCODERS[encoder]
    training, test = crops(real, "train"), crops(real, "test")
    features = features_of(model, normalised(training.pixels_B3XY, how.mean, how.std), cache)
    probes = Probes(features, training.malignant_B, training.patients, STRENGTH[encoder])
    accuracy, area = leave_one_patient_out(probes)
    explained, judge = remembering(model), in_bfloat16(model)
    pairs = composites(test, counts.composites, seed=1)
    areas = pairs.areas(model.patch_embed.grid_of(pairs.pixels_B3XY))
    contrast, drops, boxes, glands = [], [], [], []
    for i, image in enumerate(normalised(pairs.pixels_B3XY, how.mean, how.std).split(1)):
        maps = maps_of(
            explained, image, logit(*probes.without(pairs.patients[i]), 1), [*names, *(SLOW if i < counts.slow else ())]
        )
        contrast.append(contrasts(maps, areas[i, 0], areas[i, 1]))
    for i, image, target in _squares(test, probes, how.mean, how.std, counts.squares):
        maps = maps_of(explained, image, target, names)
        glands.append(precision_of(maps, test.glands(model.patch_embed.grid_of(image))[i]))
        if len(drops) < counts.dropped:
            drops.append(drops_of(judge, image, maps, target))
        if len(boxes) < counts.boxed:
            boxes.append(boxes_of(judge, image, maps, target, counts.boxes))
    measures = {
        "contrast": contrast,
        "right side": right_side(contrast),
        "correctness, drop": drops,
        "box sensitivity": boxes,
        "gland AP": glands,
    }
    said = [*names, *(SLOW if counts.slow else ())]
    slow = f" ({counts.slow} for the four that take many predictions)" if counts.slow else ""
    return (
        f"### Colon tissue, {encoder}\n\nThe probe is right on {accuracy:.3f} of the training squares and has an area "
        f"under the curve of {area:.3f}, each judged without its patient. {len(contrast)} composites of the test "
        f"folder{slow}; correctness on {len(drops)} squares, {counts.boxes} boxes on {len(boxes)}, glands on "
        f"{len(glands)}, always of the square's own class.\n\n" + table_of(measures, said)
    )


def logit(weight_C: Tensor, bias: Tensor, sign: int) -> Target:
    """The malignant logit, or with −1 the benign one."""
    return lambda z: sign * (z @ weight_C + bias)


def _squares(
    test: Crops, probes: Probes, mean: tuple[float, ...], std: tuple[float, ...], count: int
) -> Iterator[tuple[int, Tensor, Target]]:
    """One square of each test image in a fixed random order, with the target of its own class."""
    first = torch.arange(0, len(test.names), 2)
    for i in first[torch.randperm(len(first), generator=torch.Generator().manual_seed(3))][:count].tolist():
        image = normalised(test.pixels_B3XY[i : i + 1], mean, std)
        yield i, image, logit(*probes.without([test.patients[i]]), 1 if test.malignant_B[i] else -1)


def main() -> None:
    """Judge what is there, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real material")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "maskattn-evidence")
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    parser.add_argument("--parts", nargs="+", default=["glass", "photographs", "glas", "slides"])
    parser.add_argument("--encoders", nargs="*", default=list(ENCODERS))
    parser.add_argument("--methods", nargs="+", help="some of them, by name")
    for name in vars(QUICK):
        parser.add_argument(f"--{name}", type=int, help="in place of the bench's own count")
    parser.add_argument("--quick", action="store_true", help="a trial on two images, which writes no page")
    arguments = parser.parse_args()
    counts = QUICK if arguments.quick else Counts()
    asked = {name: getattr(arguments, name) for name in vars(counts) if getattr(arguments, name) is not None}
    counts = replace(counts, **asked)
    names = arguments.methods or [name for name in METHODS if name not in SLOW]
    start = time.process_time()
    for part, make in _parts(arguments.real, arguments.cache, arguments.encoders, names, counts):
        if part.split(":")[0] not in arguments.parts:
            continue
        text = make()
        print(f"{part}: {time.process_time() - start:.0f} s of processor time so far\n\n{text}\n", flush=True)
        if not arguments.quick:
            write_section(arguments.page, f"real {part}", text)


def _parts(
    real: Path, cache: Path, encoders: Sequence[str], names: Sequence[str], counts: Counts
) -> Iterator[tuple[str, Callable[[], str]]]:
    """What can be judged here; what cannot is printed with its reason."""
    loaded = {name: (load_encoder(name, cache), ENCODERS[name]) for name in encoders if not missing(name, cache)}
    if not (real / "sections").is_dir():
        print(f"skipped: attention on glass, {real} has no sections", flush=True)
    elif loaded:
        yield (
            "glass",
            lambda: attention_on_glass(loaded, *edge_crops(real, 2 if counts.composites == QUICK.composites else 6)),
        )
    for encoder in encoders:
        why = missing(encoder, cache)
        if why is not None:
            print(f"skipped: {encoder}, {why}", flush=True)
            continue
        model = loaded[encoder][0]
        if encoder.startswith("CLIP"):
            if (real / "photos").is_dir() and (real / "text").is_dir():
                yield "photographs", lambda m=model, e=encoder: judge_photographs(real, m, names, counts, e)
            else:
                print(f"skipped: photographs, {real} has no photos and text", flush=True)
        if not (real / "glas").is_dir():
            print(f"skipped: colon tissue and slides, {real} has no glas", flush=True)
            continue
        yield (
            f"glas:{encoder}",
            lambda m=model, e=encoder: judge_glas(real, cache, e, m, names, counts),
        )
        if not (real / "sections").is_dir():
            print(f"skipped: slides, {real} has no sections", flush=True)
        elif encoder.startswith("CLIP"):
            yield "slides", lambda m=model, e=encoder: judge_slides(real, m, ENCODERS[e], counts.slides, cache)


if __name__ == "__main__":
    main()
