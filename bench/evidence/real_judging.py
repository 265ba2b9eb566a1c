"""Every method's maps of real images, from one pass of the backbone for each image, and the measures of these maps.

Predictions by the entire backbone (dropped tokens, boxes, occluded and noisy images) run in bfloat16, other maps in
float32.

Dimension key: B images, H·W grid tokens, C channels.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from maskattn.explain import METHODS, metrics
from maskattn.nn import VisionTransformer
from maskattn.nn.blocks import PackedTokens

__all__ = [
    "SLOW",
    "Target",
    "boxes_of",
    "compactness_of",
    "contrasts",
    "drops_of",
    "features_of",
    "gathered",
    "in_bfloat16",
    "likeness_of",
    "maps_of",
    "precision_of",
    "remembering",
]

Target = Callable[[Tensor], Tensor]
SLOW = ("integrated-gradients", "smoothgrad", "rise", "token-ablation")
"""Methods that need tens or hundreds of predictions for each map, judged on fewer images."""
_IN_BFLOAT16 = ("integrated-gradients", "smoothgrad", "rise")  # token ablation takes differences too small for it
_OPTIONS: dict[str, dict[str, Any]] = {"rise": {"m": 200}}
_REMEMBERED = 64


def features_of(model: VisionTransformer, images: Tensor, cache: Path | None = None) -> Tensor:
    """Compute class tokens (B, C), cached in a folder."""
    digest = hashlib.sha1(images.numpy().tobytes())
    digest.update(model.norm.weight.detach().numpy().tobytes())
    path = None if cache is None else cache / f"features_{digest.hexdigest()[:16]}.pt"
    if path is not None and path.exists():
        kept = torch.load(path, weights_only=True)
        assert isinstance(kept, Tensor)
        return kept
    with torch.no_grad():
        features = torch.cat([model(x) for x in images.split(16)])
    if path is not None:
        torch.save(features, path)
    return features


def remembering(model: VisionTransformer) -> VisionTransformer:
    """Return a twin with shared weights that runs its backbone once for each batch, whatever the number of methods."""
    twin = copy.copy(model)
    seen: dict[bytes, PackedTokens] = {}

    def before_last_block(tokens: PackedTokens) -> PackedTokens:
        rows = tokens.rows_TC
        if rows.requires_grad:
            return model.before_last_block(tokens)
        key = hashlib.sha1(rows.numpy().tobytes()).digest() + bytes(str(rows.shape), "ascii")
        if key not in seen:
            if len(seen) >= _REMEMBERED:
                seen.clear()
            seen[key] = model.before_last_block(tokens)
        return seen[key]

    twin.before_last_block = before_last_block  # of this twin alone
    return twin


def in_bfloat16(model: VisionTransformer) -> VisionTransformer:
    """Return a copy in bfloat16 for the many predictions of the measures; it takes images of any dtype."""
    judge = copy.deepcopy(model).to(torch.bfloat16)
    cut = judge.patch_embed.cut
    judge.patch_embed.cut = lambda images, packing: cut(images.to(torch.bfloat16), packing)
    return judge


def maps_of(
    model: VisionTransformer,
    judge: VisionTransformer,
    image_1IXY: Tensor,
    target: Target,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Compute the map (1, H, W) of each method, and one of noise, "random".

    Args:
        model: a twin from :func:`remembering`, whose output is the class token.
        judge: the same model in bfloat16, for methods that predict occluded, noisy or interpolated images.
        image_1IXY: one image.
        target: a function of the output that returns one score for each row.
        names: keys of :data:`maskattn.explain.METHODS`.
    """
    maps = {}
    for name in names:
        explainer = METHODS[name](judge if name in _IN_BFLOAT16 else model, **_OPTIONS.get(name, {}))
        of_output = _in_float(target) if name in _IN_BFLOAT16 else target
        relevance = explainer.attribute(image_1IXY, of_output, generator=torch.Generator().manual_seed(0))
        assert isinstance(relevance, Tensor)
        maps[name] = relevance.detach().float()
    seed = int.from_bytes(hashlib.sha1(image_1IXY.numpy().tobytes()).digest()[:4], "little")
    grid_HW = model.patch_embed.grid_of(image_1IXY)
    maps["random"] = torch.randn(1, *grid_HW, generator=torch.Generator().manual_seed(seed))
    return maps


def contrasts(maps: dict[str, Tensor], own_HW: Tensor, other_HW: Tensor) -> dict[str, float]:
    """Compute the object contrast of each method's map."""
    return {name: float(metrics.object_contrast(x, own_HW[None], other_HW[None])) for name, x in maps.items()}


def precision_of(maps: dict[str, Tensor], wanted_HW: Tensor) -> dict[str, float]:
    """Compute the average precision of each method's map against tokens; {} if all or none of them are wanted."""
    truth = wanted_HW.flatten().numpy()
    if truth.all() or not truth.any():
        return {}
    return {name: float(average_precision_score(truth, x.flatten().numpy())) for name, x in maps.items()}


def drops_of(
    judge: VisionTransformer, image_1IXY: Tensor, maps: dict[str, Tensor], target: Target, steps: int = 4
) -> dict[str, float]:
    """Compute the correctness of each method's map by dropping tokens, for all methods in one call."""
    stack = torch.cat(list(maps.values()))
    curves = metrics.removal_curves(judge, image_1IXY, stack, _in_float(target), steps=steps, internal_batch_size=16)
    return dict(zip(maps, curves.correctness.tolist(), strict=True))


def boxes_of(
    judge: VisionTransformer, image_1IXY: Tensor, maps: dict[str, Tensor], target: Target, count: int
) -> dict[str, float]:
    """Compute the box sensitivity of each method's map."""
    grid_HW = judge.patch_embed.grid_of(image_1IXY)
    boxes = metrics.random_boxes(grid_HW, count, torch.Generator().manual_seed(5))
    changes = metrics.box_changes(judge, image_1IXY, boxes, _in_float(target), internal_batch_size=16)
    return {name: float(metrics.box_sensitivity(x, boxes, changes)) for name, x in maps.items()}


def likeness_of(maps: dict[str, Tensor], name: str = "token-ablation") -> dict[str, float]:
    """Compute the Pearson correlation of each method's map with one method's."""
    return {key: float(metrics.correlation_of_maps(x, maps[name])) for key, x in maps.items() if key != name}


def compactness_of(maps: dict[str, Tensor]) -> dict[str, float]:
    """Compute the share of tokens with at most 5 % of the largest relevance, for each method's map."""
    return {name: float(metrics.compactness(x)) for name, x in maps.items()}


def _in_float(target: Target) -> Target:
    return lambda output: target(output.float())


def gathered(rows: Sequence[dict[str, float]], name: str) -> Tensor:
    """Return a method's values, (B,) float64; NaN where it was not judged."""
    return torch.tensor([row.get(name, np.nan) for row in rows], dtype=torch.float64)
