"""A readout's parts as one, and what else all processes hold alike; differentiable.

A result that all processes have is counted in the loss of each. So its gradient is the sum over all processes, as
everywhere in ``torch.distributed``: where all compute one loss, gradients are W times that of the loss, and their mean
over the processes, which data-parallel training takes, is that of one process.

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
    """Outputs over parts of the keys as one over all, the same in every process.

    Args:
        out_BRHD: over the keys of this process.
        exact_BRH: their log-sum-exp, float64.
        group: of the processes.

    Returns:
        out (B, R, H, D) in float32 at least, lse (B, R, H) in float64, and the factors (B, R, H) of this process's
        weights.
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
    """(W, ...), the tensors of all processes, which are alike."""
    found: Tensor = _OfEach.apply(x, group)
    return found


def sum_of_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all processes' tensors, which are alike."""
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
