"""Which configuration a call gets, by target, head width, dtype, pass and options; and which calls are supported.

Dimension key: D head width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from maskattn.kernels.config import Config, Pass, Precision, Target
from maskattn.kernels.config_table import INTERPRETER, TABLE
from maskattn.kernels.option_config_table import TABLE_WITH_OPTIONS
from maskattn.options import Options

__all__ = [
    "HEAD_WIDTHS",
    "TABLE",
    "TABLE_WITH_OPTIONS",
    "Config",
    "Pass",
    "Precision",
    "Target",
    "choose",
    "look_up",
    "padded_width",
    "split_width",
    "supports",
    "target_of",
]

HEAD_WIDTHS = range(16, 257, 8)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def padded_width(head_width: int) -> int:
    """D rounded up to a power of two, as tiles must be."""
    return triton.next_power_of_2(head_width)


def split_width(head_width: int, config: Config) -> tuple[int, int]:
    """Columns of the two parts of a tile, powers of two; the second is 0 where one part is no wider than two."""
    padded = padded_width(head_width)
    first = padded // 2
    second = max(16, padded_width(head_width - first)) if head_width > 32 else first
    return (first, second) if config.split and first + second < padded else (padded, 0)


def look_up(pass_: Pass, target: Target, head_width: int, dtype: torch.dtype, alibi_or_dropout: bool = False) -> Config:
    """The configuration of a pass on a target.

    Raises:
        KeyError: there is none; :func:`supports` says why before it comes to this.
    """
    if target == "interpreter":
        return INTERPRETER[pass_]
    precision: Precision = "single" if dtype == torch.float32 else "half"
    if alibi_or_dropout:
        return TABLE_WITH_OPTIONS[target, precision][pass_][max(64, padded_width(head_width))]
    return TABLE[target, precision][pass_][padded_width(head_width)]


def choose(pass_: Pass, q: Tensor, options: Options) -> Config:
    """The configuration of a pass for queries (..., D)."""
    alibi_or_dropout = options.slopes is not None or options.dropout_seed is not None
    return look_up(pass_, target_of(q.device), q.shape[-1], q.dtype, alibi_or_dropout)


def supports(q: Tensor, options: Options) -> str | None:
    """Why the kernels cannot run a call, as the end of a sentence that names them; None if they can.

    Args:
        q: (..., D), the queries.
        options: what it is called with.
    """
    if q.dtype not in DTYPES:
        return f"needs float32, float16 or bfloat16, got q.dtype={q.dtype}"
    if q.shape[-1] not in HEAD_WIDTHS:
        return f"needs a head width of 16 to 256 in steps of 8, got D={q.shape[-1]}"
    key_bias = options.key_bias
    if key_bias is not None and not key_bias.is_floating_point():
        return f"needs a floating key_bias, got key_bias.dtype={key_bias.dtype}"
    return _missing_on(q.device)


@torch.compiler.assume_constant_result
def _missing_on(device: torch.device) -> str | None:
    """What the device lacks; a fact of the machine, which torch.compile need not trace."""
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"needs a CUDA or ROCm GPU (or Triton's interpreter), got q.device={device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"needs a GPU of compute capability 8.0 or later, got {major}.{minor}"
    return None


def target_of(device: torch.device) -> Target:
    """The row of the table for a device."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return _target_of_capability(*torch.cuda.get_device_capability(device))


def _target_of_capability(major: int, minor: int) -> Target:
    """The row of the table for a CUDA GPU; the one with the least shared memory where there is none of its own."""
    targets: dict[tuple[int, int], Target] = {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}
    return targets.get((major, minor), "sm86")
