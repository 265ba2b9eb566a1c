"""The accuracy of the map check: verdicts on maps with known ground truth, written into docs/map_check.md.

    python -m bench.evidence.map_checks --real DIR

The ground truth is the area of the class: the malignant half of a composite (GlaS), or the lesion of a synthetic slide.
A map is right if its contrast between that area and the rest is above 0.1, and wrong if it is below −0.1; other maps
are not counted. The maps of several methods are checked, and one of noise. The check is that of ``maskattn explain``
and, on synthetic slides, also that of ``maskattn infer``.

The rule was chosen on other composites of the training images and on other slides, among dropping (0.01 to 0.5 of the
tokens), keeping only the first and the last (0.1, 0.2) and sums of these; GlaS's test folder was used only in a trial
of this script.

Dimension key: B images, H·W grid tokens, N grid tokens of one image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.evidence.real_images import composites, crops, normalised
from bench.evidence.real_judging import Target, features_of, maps_of, remembering
from bench.evidence.real_probes import Probes
from bench.evidence.real_rows import STRENGTH, logit
from bench.evidence.real_weights import ENCODERS, load_encoder, missing
from bench.evidence.slides import draw_slides, for_lesion, new_model
from bench.evidence.table import write_section
from maskattn.explain.map_check import MapCheck, check_tokens
from maskattn.explain.methods import DEFAULT_METHOD, METHODS
from maskattn.explain.metrics import object_contrast
from maskattn.nn import VisionTransformer

JUDGED = (DEFAULT_METHOD, "integrated-value", "row-ablation-linear", "cdam")
CLEAR = 0.1
VERDICTS = ("passed", "weak", "contradicts")
# Written by bench.evidence.which_map with its default number of steps, for its first seed.
SLIDE_WEIGHTS = "synthetic_slides_500_0.pt"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one map.

    Attributes:
        name: the method's name, or "noise".
        contrast: the map's contrast between the area of its class and the rest.
        verdict: the verdict of the map check.
    """

    name: str
    contrast: float
    verdict: str


def verdicts_of(
    model: VisionTransformer,
    image_1IXY: Tensor,
    target: Target,
    areas: tuple[Tensor, Tensor],
    keep_1HW: Tensor | None = None,
    **how: object,
) -> list[Verdict]:
    """Check every map of one image, all with the same random draws."""
    if keep_1HW is None:
        maps = maps_of(model, model, image_1IXY, target, JUDGED)  # none of these runs in bfloat16
    else:
        maps = _masked_maps(model, image_1IXY, keep_1HW)
    named = {"noise" if name == "random" else name: x for name, x in maps.items()}
    stack_MN = torch.stack([x.flatten() for x in named.values()])

    def scores(z: Tensor) -> Tensor:
        return target(z)[:, None].expand(-1, len(stack_MN))

    with torch.no_grad():
        tokens = model.embed(image_1IXY, keep_1HW)
    checks: list[MapCheck] = check_tokens(model, tokens, scores, stack_MN, **how)
    own, other = (area[None] for area in areas)
    contrasts = [float(object_contrast(x, own, other)) for x in named.values()]
    return [Verdict(*row) for row in zip(named, contrasts, [check.map_check for check in checks], strict=True)]


def _masked_maps(model: VisionTransformer, image: Tensor, keep_1HW: Tensor) -> dict[str, Tensor]:
    maps = {name: METHODS[name](model).attribute(image, for_lesion, keep_1HW).detach() for name in JUDGED}
    seed = int(image.sum().abs() * 1000) % 2**31
    return maps | {"random": torch.randn(keep_1HW.shape, generator=torch.Generator().manual_seed(seed))}


def on_tissue(real: Path, cache: Path, encoder: str, part: str, count: int) -> Iterator[Verdict]:
    """Yield verdicts on composites of benign and malignant tissue; the probe has seen neither patient."""
    how, model = ENCODERS[encoder], load_encoder(encoder, cache)
    training = crops(real, "train")
    features = features_of(model, normalised(training.pixels_B3XY, how.mean, how.std), cache)
    probes = Probes(features, training.malignant_B, training.patients, STRENGTH[encoder])
    pairs = composites(training if part == "train" else crops(real, part), count, seed=21)
    areas = pairs.areas(model.patch_embed.grid_of(pairs.pixels_B3XY))
    twin = remembering(model)
    for i, image in enumerate(normalised(pairs.pixels_B3XY, how.mean, how.std).split(1)):
        target = logit(*probes.without(pairs.patients[i]), 1)
        yield from verdicts_of(twin, image, target, (areas[i, 0], areas[i, 1]), shares=(), draws=3)


def on_slides(cache: Path, count: int, **how: object) -> Iterator[Verdict]:
    """Yield verdicts on entire synthetic slides, masked, with a small model that is confident on them."""
    model = new_model()
    model.load_state_dict(torch.load(cache / SLIDE_WEIGHTS, weights_only=True))
    model.eval().requires_grad_(False)
    slides = draw_slides(700_001, 2 * count, "low")
    images = slides.images(torch.zeros(len(slides.label_B), dtype=torch.bool))
    for i in slides.label_B.nonzero()[:count, 0].tolist():
        keep, lesion = slides.keep_BHW[i : i + 1], slides.lesion_BHW[i]
        yield from verdicts_of(model, images[i : i + 1], for_lesion, (lesion, keep[0] & ~lesion), keep, **how)


def table_of(columns: dict[str, Sequence[Verdict]]) -> str:
    """Return a table with a row for each kind of map and a column for each set: shares of the verdicts, and number."""
    kinds = {
        "right maps, of all methods": lambda v: v.name != "noise" and v.contrast > CLEAR,
        "wrong maps, of all methods": lambda v: v.name != "noise" and v.contrast < -CLEAR,
        f"right maps of {METHODS[DEFAULT_METHOD].title}": lambda v: v.name == DEFAULT_METHOD and v.contrast > CLEAR,
        "wrong maps of CDAM": lambda v: v.name == "cdam" and v.contrast < -CLEAR,
        "noise": lambda v: v.name == "noise",
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind, belongs in kinds.items():
        cells = []
        for verdicts in columns.values():
            found = [v.verdict for v in verdicts if belongs(v)]
            shares = " / ".join(f"{found.count(verdict) / max(len(found), 1):.0%}" for verdict in VERDICTS)
            cells.append(f"{shares} (of {len(found)})" if found else "none")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Evaluate the check on the material that is present, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real material")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "maskattn-evidence")
    parser.add_argument("--page", type=Path, default=Path("docs/map_check.md"))
    parser.add_argument("--images", type=int, default=24, help="composites of each set")
    parser.add_argument("--slides", type=int, default=40)
    arguments = parser.parse_args()
    columns: dict[str, list[Verdict]] = {}
    for encoder in ENCODERS:
        if missing(encoder, arguments.cache) is None:
            for part, words in (("train", "training"), ("test", "held-out")):
                columns[f"{words} tissue, {encoder}"] = list(
                    on_tissue(arguments.real, arguments.cache, encoder, part, arguments.images)
                )
                print(table_of(columns), flush=True)
    if (arguments.cache / SLIDE_WEIGHTS).exists():
        quick = {"shares": (), "draws": 3}
        columns["synthetic slides, as one image"] = list(on_slides(arguments.cache, arguments.slides, **quick))
        columns["synthetic slides, as `infer` does"] = list(on_slides(arguments.cache, arguments.slides))
    else:
        print(f"skipped: synthetic slides, {arguments.cache} has no {SLIDE_WEIGHTS}; run which_map first", flush=True)
    counts = f"{arguments.images} composites of each set, {arguments.slides} slides; passed / weak / contradicts."
    text = f"{counts}\n\n{table_of(columns)}"
    print(text)
    write_section(arguments.page, "verdicts", text)


if __name__ == "__main__":
    main()
