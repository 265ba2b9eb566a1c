"""Values that all processes of a group hold, computed from rows that each of them has some of; differentiable.

The class token is a row of process 0, and every process computes the logits from it. As for every result that all
processes hold (:mod:`maskattn.distributed.combine`), the gradient of the row is that of the sum of all processes'
losses: W times that of one process if all compute the same loss. Training takes the mean of the weights' gradients over
the processes, which removes W. Explanations differentiate once; :func:`counted_once` removes W for them.

Dimension key: W processes, B sequences, T rows of this process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maskattn.distributed.combine import sum_of_all
from maskattn.distributed.shards import Shards
from maskattn.distributed.transport import add_up, broadcast_first
from maskattn.shapes import Shaped

__all__ = ["counted_once", "first_rows", "of_first_process", "summed"]


def first_rows(rows: Shaped[Tensor, "T *rest"], shards: Shards) -> Shaped[Tensor, "B *rest"]:
    """Return the first row of each sequence, which process 0 holds, in all processes."""
    found: Tensor = _FirstRows.apply(rows, shards)
    return found


def of_first_process(x: Tensor, shards: Shards) -> Tensor:
    """Return process 0's tensor, such as random numbers that all processes must share; not differentiable."""
    return broadcast_first(x.detach().clone(memory_format=torch.contiguous_format), shards.group)


def summed(x: Tensor, shards: Shards) -> Tensor:
    """Return the sum of all processes' tensors, which have the same shape and dtype."""
    return sum_of_all(x, shards.group)


def counted_once(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return ``x``, which all processes hold, so that the gradients of it are those of one process."""
    found: Tensor = _CountedOnce.apply(x, group.size())
    return found


class _FirstRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards) -> Tensor:
        ctx.shards, ctx.shape = shards, rows.shape
        if shards.rank == 0:
            first = rows.index_select(0, shards.cu_seqlens[:-1])
        else:
            first = rows.new_empty((shards.batch_size, *rows.shape[1:]))
        return broadcast_first(first, shards.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shards: Shards = ctx.shards
        total = add_up(grads[0].clone(memory_format=torch.contiguous_format), shards.group)
        of_rows = total.new_zeros(ctx.shape)
        if shards.rank == 0:
            of_rows.index_copy_(0, shards.cu_seqlens[:-1].long(), total)
        return of_rows, None


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.count, None
