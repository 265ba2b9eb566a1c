"""Tile reads by the copy engine (TMA): their conditions, and launches with memory for a kernel's descriptors."""

from __future__ import annotations

import contextvars
from typing import Any

import torch
import triton
from torch import Tensor

from maskattn.kernels.launch.rows import Rows, strides_bht

__all__ = ["describable", "launch"]

# Alignment in bytes that every row must have, and the first row of every sequence.
ALIGNMENT = 16


def describable(x: Tensor, rows: Rows) -> bool:
    """Return whether a descriptor can cover the rows of each sequence, which must be consecutive and aligned.

    Args:
        x: (T, H, D) or (B, H, N, D) with contiguous D.
        rows: the rows of the sequences.
    """
    if rows.index is not None or strides_bht(x)[2] < x.shape[-1]:
        return False
    return x.data_ptr() % ALIGNMENT == 0 and all(
        stride * x.element_size() % ALIGNMENT == 0 for stride in strides_bht(x)
    )


def launch(kernel: Any, programs: int, described: bool, q: Tensor, *arguments: Any, **constants: Any) -> Any:
    """Launch ``programs`` programs of a kernel on q's device, if there are any, and return what Triton returns.

    Args:
        kernel: the kernel.
        programs: number of programs.
        described: whether the kernel needs memory for descriptors.
        q: a tensor on the device.
        arguments, constants: arguments of the kernel.
    """
    if programs == 0:
        return None

    with torch.cuda.device_of(q):
        if not described:
            return kernel[(programs, 1, 1)](*arguments, **constants)

        def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
            return torch.empty(size, dtype=torch.int8, device=q.device)

        def run() -> Any:
            triton.set_allocator(allocate)
            return kernel[(programs, 1, 1)](*arguments, **constants)

        # The allocator is set in a copied context, so that a user's own allocator is not replaced.
        return contextvars.copy_context().run(run)
