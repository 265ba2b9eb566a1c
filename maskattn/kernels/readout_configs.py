"""Tiles and splits of the readout's kernels, by target, padded head width, dtype and pass.

Nothing here is measured on a GPU. The passes are bound by memory: a tile should be large enough for the loads in flight
to cover the memory's latency, and small enough that several programs fit on a multiprocessor. The rows are the largest
tiles that, with every option, spill no register (triton 3.7.1, compiled ahead of time).

Dimension key: N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton

from maskattn.kernels.configs import Target, padded_width, target_of

__all__ = ["ReadoutConfig", "ReadoutPass", "choose_readout", "look_up_readout", "number_of_splits"]

ReadoutPass = Literal["readout", "readout_gradient", "relevance"]


@dataclass(frozen=True)
class ReadoutConfig:
    """Keys of a tile, warps of a program, stages of the software pipeline, programs that fit on a multiprocessor."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int


# Tokens of the interpreter's machine: enough for two splits of most tests' sequences.
INTERPRETER = ReadoutConfig(64, 4, 1, 4)


def look_up_readout(pass_: ReadoutPass, target: Target, head_width: int, dtype: torch.dtype) -> ReadoutConfig:
    if target == "interpreter":
        return INTERPRETER
    return ReadoutConfig(64, 4, 2, 4)


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
    return min(64, max(16, triton.next_power_of_2(classes)))


def slots(config: ReadoutConfig, head_width: int, dtype: torch.dtype) -> int:
    """Rows of a tile that a program's threads hold side by side, 16 bytes a thread; ``readout_tiles`` has the use."""
    lanes = 64 if torch.version.hip is not None else 32
    threads_of_row = min(lanes, padded_width(head_width) * dtype.itemsize // 16)
    return min(config.block_n, config.num_warps * lanes // threads_of_row)
