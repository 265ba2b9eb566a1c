"""Gradients of weights that every process of a group has, as one process would have found them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from maskattn.distributed.transport import add_up

__all__ = ["average_gradients"]


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Replace the gradient of each parameter by its mean over the processes. All of them call it, after ``backward``.

    Where each process has computed the loss of one slide from what all hold alike (logits of a class token, a pooled
    mean), and gone backward from it, the mean is the gradient that one process with the whole slide finds, to rounding.
    Data-parallel wrappers, which take the mean themselves, need no such call.

    Args:
        parameters: in the same order in all processes. One whose gradient is None everywhere keeps it.
        group: of the processes.

    Raises:
        GroupError: a process has ended, or does not call.
    """
    learnt = [x for x in parameters if x.requires_grad]
    if not learnt:
        return
    present = torch.tensor([x.grad is not None for x in learnt], dtype=torch.int32, device=learnt[0].device)
    found = [x for x, count in zip(learnt, add_up(present, group).tolist(), strict=True) if count]
    for dtype in dict.fromkeys(x.dtype for x in found):
        alike = [x for x in found if x.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        flat = torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).flatten().to(wide) for x in alike])
        add_up(flat, group).div_(group.size())
        for x, mean in zip(alike, flat.split([x.numel() for x in alike]), strict=True):
            x.grad = mean.view(x.shape).to(dtype)
