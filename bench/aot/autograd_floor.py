"""What torch itself needs for a call of attention at least: memory for its results, and an autograd function for them.

The function takes q, k and v alone, returns one result and computes nothing. It does not go through torch's dispatcher,
which calls of the package that nothing observes avoid, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

__all__ = ["allocate", "allocate_with_gradients"]


def allocate(q: Tensor) -> Tensor:
    """Return memory for the output of q (Tq, H, D), after allocating that of lse (H, Tq), too."""
    torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    return torch.empty_like(q)


class _Empty(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = allocate(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


allocate_with_gradients = _Empty.apply
