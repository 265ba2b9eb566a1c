"""A table of every explanation method on one model and some images.

    python -m bench.evidence.explanations IMAGE... --model timm:vit_tiny_patch16_224 --classes 207 281
    python -m bench.evidence.explanations --model timm:vit_tiny_patch16_224 --offline        # random weights and images

The two classes of each image give the class correlation. If it is known which tokens show which class
(bench/evidence/digits.py), the two-object contrast is computed, too.

Dimension key: B images, H·W grid tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.evidence.table import Row, markdown_table
from maskattn.explain import METHODS
from maskattn.explain.explainer import Explainer
from maskattn.explain.metrics import (
    box_changes,
    box_sensitivity,
    compactness,
    correlation_of_maps,
    object_contrast,
    random_boxes,
    removal_curves,
)
from maskattn.nn import VisionTransformer

__all__ = ["HIGHER_IS_BETTER", "LOWER_IS_BETTER", "judge", "methods"]

HIGHER_IS_BETTER = ("correctness", "box sensitivity", "compactness", "two-object contrast")
LOWER_IS_BETTER = ("class correlation", "ms an image and class")
BENCH_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"internal_batch_size": 400} for name in ("smooth", "integrated", "integrated-norm")},
    "rise": {"m": 500, "internal_batch_size": 100},
    "token-ablation": {"internal_batch_size": 100},
}


def methods(model: VisionTransformer) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return every method of the registry by title, as a function (images, (B,) classes) → (B, H, W)."""
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    for method in METHODS.values():
        explainer = method(model, **BENCH_OPTIONS.get(method.name, {}))

        def explain(x: Tensor, target: Tensor, explainer: Explainer = explainer) -> Tensor:
            maps = explainer.attribute(x, target, generator=torch.Generator().manual_seed(0))
            assert isinstance(maps, Tensor)
            return maps

        calls[method.title] = explain
    return calls


def in_batches(explain: Callable[[Tensor, Tensor], Tensor], images: Tensor, classes: Tensor, size: int = 25) -> Tensor:
    """Explain many images in batches, (B, H, W)."""
    batches = zip(images.split(size), classes.split(size), strict=True)
    return torch.cat([explain(x, target) for x, target in batches])


def judge(
    model: VisionTransformer,
    x: Tensor,
    classes_B2: Tensor,
    areas_B2HW: Tensor | None = None,
    *,
    perturbations: Sequence[str] = ("drop",),
    names: Sequence[str] | None = None,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Compute every metric of every method, and the maps (B, 2, H, W).

    Args:
        model: a model with a class token.
        x: (B, I, X, Y) images.
        classes_B2: (B, 2), the classes to explain; correctness, boxes and compactness judge the first.
        areas_B2HW: (B, 2, H, W) bool, the tokens that show each class; None omits the two-object contrast.
        perturbations: ways to remove tokens.
        names: titles of methods; None takes all. A map of noise comes last.
    """
    left, right = classes_B2.unbind(1)
    grid_HW = model.patch_embed.grid_of(x)
    boxes = random_boxes(grid_HW, 100, torch.Generator().manual_seed(5))
    changes = box_changes(model, x, boxes, left, internal_batch_size=200)
    rows, maps = [], {}
    contenders = methods(model)
    random_maps = torch.randn(2, len(x), *grid_HW, generator=torch.Generator().manual_seed(9))
    for name in [*(names or contenders), "random"]:
        start = time.perf_counter()
        if name == "random":
            one, two = random_maps
        else:
            one, two = (in_batches(contenders[name], x, c) for c in (left, right))
        seconds = time.perf_counter() - start
        values = {
            f"correctness, {kind}": removal_curves(
                model, x, one, left, perturbation=kind, steps=12, internal_batch_size=200
            ).correctness
            for kind in perturbations
        }
        values |= {
            "box sensitivity": box_sensitivity(one, boxes, changes),
            "compactness": compactness(one),
            "class correlation": correlation_of_maps(one, two),
        }
        if areas_B2HW is not None:
            own, other = areas_B2HW.unbind(1)
            contrast = object_contrast(one, own, other) + object_contrast(two, other, own)
            values["two-object contrast"] = contrast / 2
        rows.append(Row(name, values, {"ms an image and class": 1000 * seconds / (2 * len(x))}))
        maps[name] = torch.stack([one, two], dim=1)
        print(f"{name}: {seconds:.0f} s", flush=True)
    return rows, maps


def main() -> None:
    """Explain, judge, print."""
    from maskattn.explain.single_image import normalised, read_image
    from maskattn.nn.checkpoints import load_vit

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="*")
    parser.add_argument("--model", default="timm:vit_tiny_patch16_224")
    parser.add_argument("--classes", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--methods", nargs="+", help="some of them, by name")
    parser.add_argument("--offline", action="store_true", help="random weights, for a trial of the bench alone")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = load_vit(arguments.model, **({"pretrained": False} if arguments.offline else {}))
    p = model.patch_embed.patch_size
    size = model.grid_HW[0] * p, model.grid_HW[1] * p
    half = (0.5,) * 3
    x = torch.cat(
        [normalised(read_image(path, size), half, half) for path in arguments.images] or [torch.randn(2, 3, *size)]
    )
    rows, _ = judge(model, x, torch.tensor([arguments.classes]).expand(len(x), 2), names=arguments.methods)
    print(markdown_table(rows, HIGHER_IS_BETTER, LOWER_IS_BETTER))


if __name__ == "__main__":
    main()
