"""Targets of explanations: from a caller's ``target`` to the scores that are differentiated.

Dimension key: B images, K outputs of the model, M maps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor

from maskattn.shapes import Float

__all__ = ["Target", "gives_one_map", "is_index", "select_scores"]

Target: TypeAlias = "int | Tensor | Sequence[int] | str | Callable[[Tensor], Tensor]"


def select_scores(output_BK: Float[Tensor, "B K"], target: Target) -> Float[Tensor, "B M"]:
    """Select the scores to explain, one column for each map.

    Args:
        output_BK: the model's output: raw logits, or features if it has no head.
        target: a class index, of Python, numpy or torch; a (B,) tensor with one for each image; a list of indices
            (M maps); "all" (K maps); or a function of the output that returns (B,) or (B, M).

    Raises:
        TypeError, ValueError: the target is of another kind, or out of range.
    """
    if output_BK.ndim != 2:
        raise ValueError(
            "an explanation needs an output of scores for each image, (B, K), got shape "
            f"{tuple(output_BK.shape)}; convert or build the model with another global_pool than ''"
        )
    B, K = output_BK.shape
    if callable(target):
        scores = target(output_BK)
        if scores.ndim not in (1, 2) or scores.shape[0] != B:
            raise ValueError(
                f"a target function must return (B,) or (B, M) scores with B={B}, got shape {tuple(scores.shape)}"
            )
        return scores[:, None] if scores.ndim == 1 else scores
    if isinstance(target, str):
        if target != "all":
            raise ValueError(f"a target string must be 'all', got target={target!r}; give a class by its index")
        return output_BK
    if is_index(target):
        classes = [operator.index(target)]  # type: ignore[arg-type]  # is_index made sure
    elif isinstance(target, Tensor):
        if target.shape != (B,) or target.dtype.is_floating_point or target.dtype == torch.bool:
            raise ValueError(
                f"a target tensor must hold one class index for each image, (B,) = ({B},) integers, got shape "
                f"{tuple(target.shape)} of {target.dtype}; pass a list for several maps of every image"
            )
        _check_range(target.unique().tolist(), K)
        return output_BK.gather(1, target.to(output_BK.device).long()[:, None])
    elif isinstance(target, (list, tuple, range)) and target and all(map(is_index, target)):
        classes = [operator.index(c) for c in target]
    else:
        raise TypeError(
            "target must be a class index, a (B,) tensor, a list of indices, 'all' or a function of the output, "
            f"got {target!r}"
        )
    _check_range(classes, K)
    return output_BK[:, classes]


def gives_one_map(target: Target, count: int) -> bool:
    """Return whether the result is (B, H, W), without an axis for maps; ``count`` is the number of the scores."""
    if callable(target):
        return count == 1
    return is_index(target) or isinstance(target, Tensor)


def is_index(target: object) -> bool:
    """Return whether this is one class index: a Python or NumPy integer, or a 0-dimensional integer tensor."""
    if isinstance(target, Tensor):
        return target.ndim == 0 and not (target.dtype.is_floating_point or target.dtype == torch.bool)
    return isinstance(target, SupportsIndex) and not isinstance(target, (bool, np.ndarray))


def _check_range(classes: Sequence[int], K: int) -> None:
    wrong = [c for c in classes if not 0 <= c < K]
    if wrong:
        raise ValueError(f"target must be in 0 … {K - 1}, the indices of the model's outputs, got {wrong[0]}")
