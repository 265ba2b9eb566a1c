"""The conditions under which the Gluon kernel can run a call.

Dimension key: D head width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from maskattn.kernels.launch import support
from maskattn.kernels.tables import lookup
from maskattn.options import Options
from maskattn.registration import constant_in_traces

__all__ = ["DTYPES", "supports"]

DTYPES = (torch.float16, torch.bfloat16)


def supports(q: Tensor, options: Options) -> str | None:
    """Return the reason why the kernel cannot run a call, as the end of a sentence; None if it can.

    Args:
        q: (Tq, H, D), the queries; those of the other operations have four axes.
        options: the options of the call.
    """
    if q.ndim != 3:
        return f"computes only packed_attention, got queries of shape {tuple(q.shape)}"
    if q.dtype not in DTYPES:
        return f"needs float16 or bfloat16, got q.dtype={q.dtype}"
    return support.supports(q, options) or _missing_on(q.device)


@constant_in_traces
def _missing_on(device: torch.device) -> str | None:
    """Return what the installed triton or the device lacks, or None; a constant that torch.compile need not trace."""
    if tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 7):
        return f"needs triton 3.7 or later, got triton {triton.__version__}"
    target = lookup.target_of(device)
    if target != "sm90":
        return f"needs a GPU of compute capability 9.0, got one that is treated as {target}"
    return None
