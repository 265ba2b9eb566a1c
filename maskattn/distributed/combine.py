"""Combine the processes' shares of a readout into one result that all processes hold; differentiable.

A result that all processes hold enters the loss of each. Its gradient is therefore the sum over all processes, as
elsewhere in ``torch.distributed``: if all compute the same loss, the sum is W times its gradient, and the mean over the
processes, which data-parallel training takes, is the gradient of one process.

Dimension key: W processes, B sequences, R readout queries, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maskattn.distributed.partial import wide
from maskattn.distributed.transport import add_up, gather_alike

__all__ = ["combine", "of_each", "sum_of_all"]


def combine(out_BRHD: Tensor, exact_BRH: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Combine outputs over each process's keys into the output over all keys, the same in every process.

    Args:
        out_BRHD: (B, R, H, D) the output over the keys of this process.
        exact_BRH: (B, R, H) the log-sum-exp of their scores, float64.
        group: the process group.

    Returns:
        out (B, R, H, D) in float32 or float64, lse (B, R, H) in float64, and the factors (B, R, H) by which the
        attention weights of this process's keys are multiplied.
    """
    lse_WBRH = of_each(exact_BRH, group)
    out_WBRHD = of_each(out_BRHD.to(wide(out_BRHD)), group)
    largest = lse_WBRH.detach().amax(dim=0)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weight_WBRH = (lse_WBRH - largest).exp()
    total = weight_WBRH.sum(dim=0)
    empty = total == 0
    safe = total.masked_fill(empty, 1)
    share_WBRH = weight_WBRH / safe
    out = (share_WBRH.to(out_WBRHD.dtype)[..., None] * out_WBRHD).sum(dim=0)
    lse = (largest + safe.log()).masked_fill(empty, -torch.inf)
    return out, lse, share_WBRH[group.rank()]


def of_each(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return (W, ...), the tensors of all processes, which have the same shape and dtype."""
    found: Tensor = _OfEach.apply(x, group)
    return found


def sum_of_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of all processes' tensors, which have the same shape and dtype."""
    found: Tensor = _SumOfAll.apply(x, group)
    return found


class _OfEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return torch.stack(gather_alike(x, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        summed = add_up(grads[0].clone(memory_format=torch.contiguous_format), ctx.group)
        return summed[ctx.group.rank()], None


class _SumOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return add_up(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return add_up(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None
