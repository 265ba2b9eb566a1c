"""Tiles and splits of the readout's kernels, by target, padded head width, dtype and pass.

Nothing here is measured on a GPU. The passes are bound by memory, so that a tile need only be large enough for the
loads in flight to cover the memory's latency: 8 KiB of K and of V, less where a tile would spill registers with every
option and several queries (triton 3.7.1, compiled ahead of time; ``bench/aot/readout_cases.py`` has the cases).

Dimension key: N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton

from maskattn.kernels.configs import Target, padded_width, target_of

__all__ = [
    "READOUT_TABLE",
    "ReadoutConfig",
    "ReadoutPass",
    "choose_readout",
    "class_tile",
    "look_up_readout",
    "number_of_splits",
    "slots",
]

ReadoutPass = Literal["readout", "readout_gradient", "relevance"]


@dataclass(frozen=True)
class ReadoutConfig:
    """Keys of a tile, warps of a program, stages of the software pipeline, programs that fit on a multiprocessor."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int


Precision = Literal["half", "single"]
Table = dict[ReadoutPass, dict[int, ReadoutConfig]]

NVIDIA_HALF: Table = {
    "readout": {
        16: ReadoutConfig(128, 4, 2, 4),
        32: ReadoutConfig(128, 4, 2, 4),
        64: ReadoutConfig(64, 4, 2, 4),
        128: ReadoutConfig(32, 4, 2, 4),
        256: ReadoutConfig(16, 4, 2, 4),
    },
    "readout_gradient": {
        16: ReadoutConfig(64, 8, 2, 2),
        32: ReadoutConfig(64, 8, 2, 2),
        64: ReadoutConfig(64, 8, 2, 2),
        128: ReadoutConfig(32, 8, 2, 2),
        256: ReadoutConfig(16, 8, 2, 2),
    },
    "relevance": {
        16: ReadoutConfig(64, 8, 2, 2),
        32: ReadoutConfig(64, 8, 2, 2),
        64: ReadoutConfig(64, 8, 2, 2),
        128: ReadoutConfig(32, 8, 2, 2),
        256: ReadoutConfig(16, 8, 1, 2),
    },
}
NVIDIA_SINGLE: Table = {
    "readout": {
        16: ReadoutConfig(64, 8, 2, 2),
        32: ReadoutConfig(64, 8, 2, 2),
        64: ReadoutConfig(32, 8, 2, 2),
        128: ReadoutConfig(16, 8, 2, 2),
        256: ReadoutConfig(16, 8, 2, 2),
    },
    "readout_gradient": {
        16: ReadoutConfig(32, 8, 2, 2),
        32: ReadoutConfig(32, 8, 2, 2),
        64: ReadoutConfig(32, 8, 2, 2),
        128: ReadoutConfig(16, 8, 2, 2),
        256: ReadoutConfig(16, 8, 2, 1),
    },
    "relevance": {
        16: ReadoutConfig(16, 8, 1, 2),
        32: ReadoutConfig(16, 8, 1, 2),
        64: ReadoutConfig(16, 8, 1, 2),
        128: ReadoutConfig(16, 8, 1, 2),
        256: ReadoutConfig(16, 8, 1, 1),
    },
}
AMD_HALF: Table = {
    pass_: {
        16: ReadoutConfig(128, 4, 1, 4),
        32: ReadoutConfig(128, 4, 1, 4),
        64: ReadoutConfig(64, 4, 1, 4),
        128: ReadoutConfig(32, 4, 1, 4),
        256: ReadoutConfig(16, 4, 1, 4),
    }
    for pass_ in ("readout", "readout_gradient", "relevance")
}
AMD_SINGLE: Table = {
    pass_: {
        16: ReadoutConfig(64, 4, 1, 4),
        32: ReadoutConfig(64, 4, 1, 4),
        64: ReadoutConfig(32, 4, 1, 4),
        128: ReadoutConfig(16, 4, 1, 4),
        256: ReadoutConfig(16, 4, 1, 4),
    }
    for pass_ in ("readout", "readout_gradient", "relevance")
}
# Many classes of several queries spilled in the tiles above.
SM86_HALF: Table = {**NVIDIA_HALF, "relevance": {**NVIDIA_HALF["relevance"], 64: ReadoutConfig(32, 8, 2, 2)}}
SM100_HALF: Table = {**NVIDIA_HALF, "relevance": {**NVIDIA_HALF["relevance"], 256: ReadoutConfig(16, 4, 1, 2)}}
READOUT_TABLE: dict[tuple[Target, Precision], Table] = {
    ("sm80", "half"): NVIDIA_HALF,
    ("sm86", "half"): SM86_HALF,
    ("sm90", "half"): NVIDIA_HALF,
    ("sm100", "half"): SM100_HALF,
    ("gfx942", "half"): AMD_HALF,
    ("sm80", "single"): NVIDIA_SINGLE,
    ("sm86", "single"): NVIDIA_SINGLE,
    ("sm90", "single"): NVIDIA_SINGLE,
    ("sm100", "single"): NVIDIA_SINGLE,
    ("gfx942", "single"): AMD_SINGLE,
}

INTERPRETER = ReadoutConfig(64, 4, 1, 4)


def look_up_readout(pass_: ReadoutPass, target: Target, head_width: int, dtype: torch.dtype) -> ReadoutConfig:
    """The configuration of a pass on a target."""
    if target == "interpreter":
        return INTERPRETER
    precision: Precision = "single" if dtype == torch.float32 else "half"
    return READOUT_TABLE[target, precision][pass_][padded_width(head_width)]


def choose_readout(pass_: ReadoutPass, device: torch.device, head_width: int, dtype: torch.dtype) -> ReadoutConfig:
    """The configuration of a pass on a device."""
    return look_up_readout(pass_, target_of(device), head_width, dtype)


def number_of_splits(config: ReadoutConfig, max_seqlen: int, pairs: int, device: torch.device) -> int:
    """Programs that share one sequence and head's keys: as many as one wave of programs has room for, of a tile each
    at least. Known without asking the device.

    Args:
        pairs: B·H.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    room = processors * config.programs // max(pairs, 1)
    return max(1, min(room, triton.cdiv(max_seqlen, config.block_n)))


def class_tile(classes: int, head_width: int, dtype: torch.dtype) -> int:
    """Classes that one program of token relevance serves: one is multiplied element by element, more fill a tile."""
    if classes == 1:
        return 1
    wide = padded_width(head_width) * dtype.itemsize > 256
    if dtype == torch.float32:
        # Its products are unrolled into registers: wider tiles spill, and wide heads take one class at a time.
        return 1 if wide else 16
    return min(32 if wide else 64, max(16, triton.next_power_of_2(classes)))


def slots(config: ReadoutConfig, head_width: int, dtype: torch.dtype) -> int:
    """Rows of a tile that a program's threads hold side by side, 16 bytes a thread; ``readout_tiles`` has the use."""
    lanes = 64 if torch.version.hip is not None else 32
    threads_of_row = min(lanes, padded_width(head_width) * dtype.itemsize // 16)
    return min(config.block_n, config.num_warps * lanes // threads_of_row)
