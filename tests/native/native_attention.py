"""Run the C++ attention on the inputs of ``oracles``, and name its results as the reference's are named."""

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
    """The worst that torch.empty may hold."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def run_packed(x: Inputs, lengths_q: Sequence[int], lengths_k: Sequence[int], **how: Any) -> Results:
    """out, lse and every gradient of the packed operation."""
    where = [cu_seqlens(lengths).numpy() for lengths in (lengths_q, lengths_k)]
    shape_lse = (x.q.shape[1], x.q.shape[0])
    return _run(_native.attention_forward, _native.attention_backward, x, where, shape_lse, how)


def run_masked(x: Inputs, keep: Tensor, skip_queries: bool, **how: Any) -> Results:
    """out, lse and every gradient of the masked operation."""
    forward, backward = _native.masked_attention_forward, _native.masked_attention_backward
    return _run(forward, backward, x, [keep.numpy()], x.q.shape[:3], how | {"skip_queries": skip_queries})


def _run(forward: Any, backward: Any, x: Inputs, where: list, shape_lse: Sequence[int], how: dict) -> Results:
    q, k, v = map(as_numpy, (x.q, x.k, x.v))
    tensors = {name: as_numpy(getattr(x, name)) for name in ("key_bias", "coords_q", "coords_k", "slopes")}
    terms = {"scale": x.scale, **tensors}
    results = {"out": unwritten(x.q.shape, x.q.dtype), "lse": unwritten(shape_lse, torch.float32)}
    out, lse = map(as_numpy, results.values())
    rest = as_numpy(unwritten(shape_lse, torch.float32))
    forward(q, k, v, *where, out, lse, lse_rest=rest, **terms, **how)
    assert np.isfinite(rest).all()
    grads = {f"d{name}": unwritten(leaf.shape, leaf.dtype) for name, leaf in x.leaves().items()}
    dq, dk, dv, dbias, dslopes = (as_numpy(grads.get(f"d{name}")) for name in ("q", "k", "v", "key_bias", "slopes"))
    backward(
        *(as_numpy(x.grad_out), q, k, v, out, lse, *where, dq, dk, dv),
        lse_rest=rest,
        grad_lse=as_numpy(x.grad_lse),
        dbias=dbias,
        dslopes=dslopes,
        **terms,
        **how,
    )
    return results | grads
