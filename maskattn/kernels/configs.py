"""Tile sizes of every kernel, chosen by target, head width, dtype and pass; and which calls the kernels support.

Nothing here is measured yet. The rows started from what is published for the fastest kernels on an H100 and were then
chosen with triton 3.7.1 by compiling for each target: the first of a list of candidates that, with and without a key
bias and a gather, spills no register and fits in the chip's shared and tensor memory. ``bench/aot_report.py`` writes
what each of them costs to ``bench/results``.

Dimension key: M queries of a tile, N keys of a tile, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from maskattn.options import Options

__all__ = [
    "HEAD_WIDTHS",
    "TABLE",
    "Config",
    "Pass",
    "Target",
    "choose",
    "look_up",
    "padded_width",
    "split_width",
    "supports",
]

HEAD_WIDTHS = range(16, 257, 8)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Pass = Literal["forward", "query_gradient", "key_gradient"]
Target = Literal["sm80", "sm86", "sm90", "sm100", "gfx942", "interpreter"]


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a program, stages of the software pipeline.

    ``split``: a head width between two powers of two is taken in two parts instead of being padded to the next.
    ``descriptors``: the copy engine reads the tiles that pass by, where the tensors allow it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False
    descriptors: bool = False


Precision = Literal["half", "single"]

# pass -> padded head width -> configuration
Table = dict[Pass, dict[int, Config]]

TABLE: dict[tuple[Target, Precision], Table] = {
    ("sm80", "half"): {
        "forward": {
            16: Config(128, 64, 4, 3),
            32: Config(128, 64, 4, 3),
            64: Config(128, 64, 8, 3),
            128: Config(128, 32, 8, 3),
            256: Config(64, 64, 8, 2),
        },
        "query_gradient": {
            16: Config(64, 64, 4, 3),
            32: Config(64, 64, 4, 3),
            64: Config(128, 64, 8, 2),
            128: Config(128, 32, 8, 2),
            256: Config(64, 32, 8, 2),
        },
        "key_gradient": {
            16: Config(64, 128, 8, 2),
            32: Config(64, 128, 8, 2),
            64: Config(32, 64, 4, 2),
            128: Config(64, 64, 8, 2),
            256: Config(32, 32, 8, 1),
        },
    },
    ("sm80", "single"): {
        "forward": {
            16: Config(32, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(32, 32, 4, 1),
            128: Config(32, 16, 8, 1),
            256: Config(64, 16, 8, 1),
        },
        "query_gradient": {
            16: Config(64, 32, 8, 1),
            32: Config(32, 32, 4, 1),
            64: Config(32, 32, 4, 1),
            128: Config(16, 32, 8, 1),
            256: Config(32, 32, 16, 1),
        },
        "key_gradient": {
            16: Config(32, 64, 8, 1),
            32: Config(32, 64, 8, 1),
            64: Config(32, 32, 8, 1),
            128: Config(16, 32, 8, 1),
            256: Config(32, 32, 16, 1),
        },
    },
    ("sm86", "half"): {
        "forward": {
            16: Config(128, 64, 4, 3),
            32: Config(128, 64, 4, 3),
            64: Config(128, 64, 8, 3),
            128: Config(128, 32, 8, 3),
            256: Config(64, 32, 8, 2),
        },
        "query_gradient": {
            16: Config(64, 64, 4, 3),
            32: Config(64, 64, 4, 3),
            64: Config(128, 64, 8, 2),
            128: Config(128, 32, 8, 2),
            256: Config(64, 32, 8, 1),
        },
        "key_gradient": {
            16: Config(64, 128, 8, 2),
            32: Config(64, 128, 8, 2),
            64: Config(32, 64, 4, 2),
            128: Config(64, 64, 8, 2),
            256: Config(32, 32, 8, 1),
        },
    },
    ("sm86", "single"): {
        "forward": {
            16: Config(32, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 8, 1),
            128: Config(32, 16, 8, 1),
            256: Config(32, 16, 8, 1),
        },
        "query_gradient": {
            16: Config(64, 32, 8, 1),
            32: Config(32, 32, 4, 1),
            64: Config(64, 32, 8, 1),
            128: Config(16, 32, 8, 1),
            256: Config(32, 16, 8, 1),
        },
        "key_gradient": {
            16: Config(32, 64, 8, 1),
            32: Config(32, 64, 8, 1),
            64: Config(32, 32, 8, 1),
            128: Config(16, 32, 8, 1),
            256: Config(16, 32, 8, 1),
        },
    },
    ("sm90", "half"): {
        "forward": {
            16: Config(128, 64, 4, 3),
            32: Config(128, 64, 4, 3),
            64: Config(128, 64, 4, 3),
            128: Config(128, 64, 8, 3),
            256: Config(64, 64, 8, 2),
        },
        "query_gradient": {
            16: Config(128, 64, 8, 3),
            32: Config(128, 64, 8, 3),
            64: Config(128, 64, 8, 3),
            128: Config(128, 64, 8, 3),
            256: Config(128, 32, 8, 2),
        },
        "key_gradient": {
            16: Config(64, 128, 8, 3),
            32: Config(64, 128, 8, 3),
            64: Config(64, 128, 8, 3),
            128: Config(64, 128, 8, 2),
            256: Config(32, 32, 8, 2),
        },
    },
    ("sm90", "single"): {
        "forward": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 8, 1),
            128: Config(32, 16, 8, 1),
            256: Config(32, 16, 8, 1),
        },
        "query_gradient": {
            16: Config(64, 32, 8, 1),
            32: Config(32, 32, 4, 1),
            64: Config(64, 32, 8, 1),
            128: Config(32, 32, 8, 1),
            256: Config(32, 32, 16, 1),
        },
        "key_gradient": {
            16: Config(32, 64, 8, 1),
            32: Config(32, 64, 8, 1),
            64: Config(32, 32, 8, 1),
            128: Config(16, 32, 8, 1),
            256: Config(16, 16, 8, 1),
        },
    },
    ("sm100", "half"): {
        "forward": {
            16: Config(128, 64, 8, 3),
            32: Config(128, 64, 8, 3),
            64: Config(128, 32, 4, 3),
            128: Config(128, 64, 8, 3),
            256: Config(128, 32, 8, 2),
        },
        "query_gradient": {
            16: Config(128, 64, 4, 2),
            32: Config(128, 64, 8, 2),
            64: Config(128, 64, 4, 2),
            128: Config(128, 64, 4, 2),
            256: Config(128, 32, 8, 1),
        },
        "key_gradient": {
            16: Config(64, 128, 8, 2),
            32: Config(64, 128, 8, 2),
            64: Config(64, 128, 8, 2),
            128: Config(64, 128, 8, 2),
            256: Config(32, 64, 8, 1),
        },
    },
    ("sm100", "single"): {
        "forward": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 8, 1),
            128: Config(32, 16, 8, 1),
            256: Config(32, 16, 8, 1),
        },
        "query_gradient": {
            16: Config(64, 32, 8, 1),
            32: Config(64, 32, 8, 1),
            64: Config(64, 32, 8, 1),
            128: Config(32, 32, 8, 1),
            256: Config(32, 32, 16, 1),
        },
        "key_gradient": {
            16: Config(32, 64, 8, 1),
            32: Config(32, 64, 8, 1),
            64: Config(16, 32, 4, 1),
            128: Config(16, 32, 4, 1),
            256: Config(16, 16, 8, 1),
        },
    },
    ("gfx942", "half"): {
        "forward": {
            16: Config(128, 64, 4, 1),
            32: Config(128, 64, 4, 1),
            64: Config(128, 64, 4, 1),
            128: Config(128, 64, 4, 1),
            256: Config(64, 32, 4, 1),
        },
        "query_gradient": {
            16: Config(128, 64, 4, 1),
            32: Config(128, 64, 4, 1),
            64: Config(128, 64, 4, 1),
            128: Config(64, 64, 4, 1),
            256: Config(64, 32, 4, 1),
        },
        "key_gradient": {
            16: Config(64, 128, 4, 1),
            32: Config(64, 128, 4, 1),
            64: Config(32, 128, 4, 1),
            128: Config(32, 64, 4, 1),
            256: Config(16, 64, 8, 1),
        },
    },
    ("gfx942", "single"): {
        "forward": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 4, 1),
            128: Config(64, 32, 4, 1),
            256: Config(64, 16, 4, 1),
        },
        "query_gradient": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 4, 1),
            128: Config(32, 32, 4, 1),
            256: Config(16, 16, 4, 1),
        },
        "key_gradient": {
            16: Config(32, 64, 4, 1),
            32: Config(32, 64, 4, 1),
            64: Config(32, 64, 4, 1),
            128: Config(16, 32, 4, 1),
            256: Config(16, 16, 2, 1),
        },
    },
}

# Few and large tiles: the interpreter pays for every operation, not for its size.
INTERPRETER: dict[Pass, Config] = {
    "forward": Config(64, 32, 4, 1),
    "query_gradient": Config(64, 32, 4, 1),
    "key_gradient": Config(32, 64, 4, 1),
}


def padded_width(head_width: int) -> int:
    """D rounded up to a power of two, as tiles must be."""
    return triton.next_power_of_2(head_width)


def split_width(head_width: int, config: Config) -> tuple[int, int]:
    """Columns of the two parts of a tile, powers of two; the second is 0 where one part is no wider than two."""
    padded = padded_width(head_width)
    first = padded // 2
    second = max(16, padded_width(head_width - first)) if head_width > 32 else first
    return (first, second) if config.split and first + second < padded else (padded, 0)


def look_up(pass_: Pass, target: Target, head_width: int, dtype: torch.dtype) -> Config:
    """The configuration of a pass on a target.

    Raises:
        KeyError: there is none; :func:`supports` says why before it comes to this.
    """
    if target == "interpreter":
        return INTERPRETER[pass_]
    precision: Precision = "single" if dtype == torch.float32 else "half"
    return TABLE[target, precision][pass_][padded_width(head_width)]


def choose(pass_: Pass, device: torch.device, head_width: int, dtype: torch.dtype) -> Config:
    """The configuration of a pass on a device."""
    return look_up(pass_, target_of(device), head_width, dtype)


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
