"""Run the C++ attention on torch tensors, and name its results as the reference's are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from oracles import Inputs, Results, cu_seqlens
from torch import Tensor

from maskattn import _native


def as_numpy(x: Tensor | None) -> np.ndarray | None:
    """The same memory; bfloat16 as uint16."""
    if x is None:
        return None
    return (x.detach().view(torch.uint16) if x.dtype == torch.bfloat16 else x.detach()).numpy()


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What torch.empty may hold at its worst."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def run_packed(
    x: Inputs, lengths_q: Sequence[int], lengths_k: Sequence[int], places: dict[str, Tensor] | None = None, **how: Any
) -> Results:
    """out, lse and every gradient of the packed operation; ``places`` has coords_q, coords_k and slopes."""
    where = [cu_seqlens(lengths).numpy() for lengths in (lengths_q, lengths_k)]
    return _run(
        _native.attention_forward, _native.attention_backward, x, where, (x.q.shape[1], x.q.shape[0]), places, how
    )


def run_masked(
    x: Inputs, keep: Tensor, skip_queries: bool, places: dict[str, Tensor] | None = None, **how: Any
) -> Results:
    """out, lse and every gradient of the masked operation."""
    how["skip_queries"] = skip_queries
    forward, backward = _native.masked_attention_forward, _native.masked_attention_backward
    return _run(forward, backward, x, [keep.numpy()], x.q.shape[:3], places, how)


def _run(
    forward: Any, backward: Any, x: Inputs, where: list, shape_lse: Sequence[int], places: Any, how: Any
) -> Results:
    q, k, v, bias, grad_out, grad_lse = map(as_numpy, (x.q, x.k, x.v, x.key_bias, x.grad_out, x.grad_lse))
    options = {name: value.numpy() for name, value in (places or {}).items()} | how
    results = {"out": unwritten(x.q.shape, x.q.dtype), "lse": unwritten(shape_lse, torch.float32)}
    out, lse = map(as_numpy, results.values())
    forward(q, k, v, *where, out, lse, x.scale, key_bias=bias, **options)
    grads = {f"d{name}": unwritten(getattr(x, name).shape, x.q.dtype) for name in "qkv"}
    extra = {}
    if bias is not None:
        extra["dkey_bias"] = unwritten(x.key_bias.shape, torch.float32)
    if places:
        extra["dslopes"] = unwritten(places["slopes"].shape, torch.float32)
    backward(
        *(grad_out, q, k, v, out, lse, *where, *map(as_numpy, grads.values()), x.scale),
        **{"grad_lse": grad_lse, "key_bias": bias, "dbias": as_numpy(extra.get("dkey_bias"))},
        **{"dslopes": as_numpy(extra.get("dslopes"))},
        **options,
    )
    return results | grads | extra
