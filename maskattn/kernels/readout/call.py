"""The arguments of every launch of a readout kernel, prepared once per call.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from maskattn.kernels.language.bundles import Tokens
from maskattn.kernels.launch.arguments import (
    bounds_argument,
    known_multiple,
    terms_argument,
    tokens_argument,
)
from maskattn.kernels.launch.rows import packed_rows, readable
from maskattn.kernels.tables.config import ReadoutConfig, ReadoutPass
from maskattn.kernels.tables.lookup import choose, padded_width
from maskattn.options import Options

__all__ = ["ReadoutCall", "class_tile", "number_of_splits", "prepare", "readout_argument", "slots"]

# One row is multiplied element by element; more are padded to the size of a tensor core's operand.
PADDED_ROWS = 16


class ReadoutCall(NamedTuple):
    """The arguments that the readout's kernels have in common.

    Attributes:
        arguments: q, k, v, the terms of the scores, the bounds of the sequences, B, H, R and T, in this order.
        widths: compile-time constants.
        grid: one program per head, split and sequence.
        splits: programs that share the keys of one sequence and head.
        launch_options: warps and stages.
    """

    arguments: tuple[Any, ...]
    widths: dict[str, int]
    grid: tuple[int]
    splits: int
    launch_options: dict[str, int]


def prepare(
    pass_: ReadoutPass, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, options: Options
) -> ReadoutCall:
    """The common arguments of a pass; copies only tensors that the kernels cannot read in place."""
    B, R, H, D = q.shape
    config = choose(pass_, q, options)
    splits = number_of_splits(config, max_seqlen, B * H, q.device)
    return ReadoutCall(
        arguments=(
            readout_argument(q),
            tokens_argument(readable(k)),
            tokens_argument(readable(v)),
            terms_argument(options, packed=True, natural=True),
            bounds_argument(packed_rows(cu_seqlens, max_seqlen)),
            B,
            H,
            R,
            k.shape[0],
        ),
        widths={
            "HEAD_WIDTH": D,
            "BLOCK_D": padded_width(D),
            "BLOCK_R": 1 if R == 1 else PADDED_ROWS,
            "BLOCK_N": config.block_n,
            "SLOTS": slots(config, D, q.dtype) if R == 1 else 1,
        },
        grid=(H * splits * B,),
        splits=splits,
        # One row reads its tiles directly into registers, so there is nothing to pipeline.
        launch_options={"num_warps": config.num_warps, "num_stages": 1 if R == 1 else config.num_stages},
    )


def readout_argument(x: Tensor) -> Tokens:
    """The argument for a (B, R, H, D) tensor, copied if the elements of a row are not adjacent."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    strides = x.stride(0), x.stride(2), x.stride(1)
    return Tokens(x, *strides, known_multiple(*strides))


def number_of_splits(config: ReadoutConfig, max_seqlen: int, sequences_and_heads: int, device: torch.device) -> int:
    """Number of programs that share the keys of one sequence and head, known without synchronising with the device.

    It is as large as fits on the chip at a time, with at least one tile for each program.

    Args:
        config: the configuration of the pass.
        max_seqlen: an upper bound of the sequences' lengths.
        sequences_and_heads: B·H.
        device: the device of the launch.
    """
    available = processors_of(device) * config.programs // max(sequences_and_heads, 1)
    return max(1, min(available, triton.cdiv(max_seqlen, config.block_n)))


def processors_of(device: torch.device) -> int:
    """Multiprocessors of the chip; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def class_tile(classes: int, head_width: int, dtype: torch.dtype) -> int:
    """Number of classes in one program of token relevance: one is multiplied element by element, more fill a tile."""
    if classes == 1:
        return 1
    wide = padded_width(head_width) * dtype.itemsize > 256
    if dtype == torch.float32:
        # float32 products are unrolled into registers: wider tiles would spill, so wide heads take a class at a time.
        return 1 if wide else 16
    return min(32 if wide else 64, max(16, triton.next_power_of_2(classes)))


def slots(config: ReadoutConfig, head_width: int, dtype: torch.dtype) -> int:
    """Number of a tile's rows that a program's threads hold at once, 16 bytes per thread; see ``tiles.py``."""
    lanes = 64 if torch.version.hip is not None else 32
    threads_of_row = min(lanes, padded_width(head_width) * dtype.itemsize // 16)
    return min(config.block_n, config.num_warps * lanes // threads_of_row)
