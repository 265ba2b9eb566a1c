"""Run the launchers on the inputs of ``oracles`` and name their results as the reference's are named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from oracles import Inputs, Results, cu_seqlens
from torch import Tensor

from maskattn.kernels.backward import masked_backward, packed_backward
from maskattn.kernels.forward import masked_forward, packed_forward


def run_packed(inputs: Inputs, lengths_q: Sequence[int], lengths_k: Sequence[int], device: str) -> Results:
    """out, lse and every gradient of the packed launchers."""
    x = inputs.to(device)
    sides = (
        cu_seqlens(lengths_q).to(device),
        cu_seqlens(lengths_k).to(device),
        max(lengths_q, default=0),
        max(lengths_k, default=0),
    )
    out, lse = packed_forward(x.q, x.k, x.v, *sides, x.key_bias, x.scale)
    grads = packed_backward(x.grad_out, x.grad_lse, x.q, x.k, x.v, out, lse, *sides, x.key_bias, x.scale)
    return _named(x, out, lse, grads)


def run_masked(inputs: Inputs, keep: Tensor, skip_queries: bool, device: str) -> Results:
    """out, lse and every gradient of the masked launchers."""
    x, keep = inputs.to(device), keep.to(device)
    out, lse = masked_forward(x.q, x.k, x.v, keep, x.key_bias, x.scale, skip_queries)
    grads = masked_backward(x.grad_out, x.grad_lse, x.q, x.k, x.v, out, lse, keep, x.key_bias, x.scale, skip_queries)
    return _named(x, out, lse, grads)


def _named(x: Inputs, out: Tensor, lse: Tensor, grads: tuple[Tensor | None, ...]) -> Results:
    """Results by name, each checked to be contiguous and of its input's dtype."""
    results = {"out": out, "lse": lse}
    for name, grad in zip(("q", "k", "v", "key_bias"), grads, strict=True):
        leaf = getattr(x, name)
        assert (leaf is None) == (grad is None), f"d{name} is {grad}"
        if grad is not None:
            assert grad.dtype == leaf.dtype, f"d{name} is {grad.dtype}, want {leaf.dtype}"
            results[f"d{name}"] = grad
    assert (out.dtype, lse.dtype) == (x.q.dtype, torch.float32)
    assert all(result.is_contiguous() for result in results.values())
    return results
