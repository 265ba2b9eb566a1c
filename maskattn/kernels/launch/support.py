"""The conditions under which the kernels can run a call.

Dimension key: D head width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from maskattn.kernels.tables import lookup
from maskattn.options import Options
from maskattn.registration import constant_in_traces

__all__ = ["DTYPES", "HEAD_WIDTHS", "supports"]

HEAD_WIDTHS = range(16, 257, 8)
# Chips whose warps have 64 lanes with 512 registers each. On gfx1100, with 32 lanes and 256 registers, even tiles of
# 16 × 16 spill at a head width of 128.
AMD_CHIPS = ("gfx90a", "gfx942", "gfx950")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(q: Tensor, options: Options) -> str | None:
    """Return the reason why the kernels cannot run a call, as the end of a sentence; None if they can.

    Args:
        q: (..., D), the queries.
        options: the options of the call.
    """
    if q.dtype not in DTYPES:
        return f"needs float32, float16 or bfloat16, got q.dtype={q.dtype}"
    if q.shape[-1] not in HEAD_WIDTHS:
        return f"needs a head width of 16 to 256 in steps of 8, got D={q.shape[-1]}"
    key_bias = options.key_bias
    if key_bias is not None and not key_bias.is_floating_point():
        return f"needs a floating key_bias, got key_bias.dtype={key_bias.dtype}"
    return _missing_on(q.device)


@constant_in_traces
def _missing_on(device: torch.device) -> str | None:
    """Return what the device lacks, or None; a constant that torch.compile need not trace."""
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"needs a CUDA or ROCm GPU (or Triton's interpreter), got q.device={device}"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return None if name in AMD_CHIPS else f"needs one of AMD's {', '.join(AMD_CHIPS)}, got {name}"
    major, minor = lookup.capability_of(device)
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or later, got {major}.{minor}"
    return None
