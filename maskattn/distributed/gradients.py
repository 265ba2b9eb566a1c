"""Averaged gradients of weights that all processes of a group share, equal to those of a single process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from maskattn.distributed.transport import add_up

__all__ = ["average_gradients"]


def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Replace the gradient of each parameter by its mean over the processes; all of them call it after ``backward``.

    If each process computes the same loss of one slide from results that all processes hold (logits of a class token,
    a pooled mean), the mean is, to rounding, the gradient of a single process with the whole slide. Data-parallel
    wrappers take the mean themselves and need no such call.

    Args:
        parameters: the parameters, in the same order in all processes. If a gradient is None in all of them, it stays
            None.
        group: the process group.

    Raises:
        GroupError: a process has ended, or does not make the call.
    """
    learnt = [x for x in parameters if x.requires_grad]
    if not learnt:
        return
    present = torch.tensor([x.grad is not None for x in learnt], dtype=torch.int32, device=learnt[0].device)
    used = [x for x, count in zip(learnt, add_up(present, group).tolist(), strict=True) if count]
    for dtype in dict.fromkeys(x.dtype for x in used):
        same = [x for x in used if x.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        flat = torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).flatten().to(wide) for x in same])
        add_up(flat, group).div_(group.size())
        for x, mean in zip(same, flat.split([x.numel() for x in same]), strict=True):
            x.grad = mean.view(x.shape).to(dtype)
