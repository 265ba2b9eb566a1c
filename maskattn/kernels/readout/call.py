"""The arguments of every launch of a readout kernel, prepared once per call.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.language.bundles import Tokens
from maskattn.kernels.launch.arguments import (
    bounds_argument,
    known_multiple,
    terms_argument,
    tokens_argument,
)
from maskattn.kernels.launch.prepared import Launch, launch_prepared
from maskattn.kernels.launch.rows import packed_rows, readable
from maskattn.kernels.tables.config import ReadoutConfig, ReadoutPass
from maskattn.kernels.tables.lookup import choose, padded_width
from maskattn.options import Options

__all__ = ["ReadoutCall", "class_tile", "launch", "number_of_splits", "prepare", "readout_argument", "slots"]

# A single row is multiplied element by element; more rows are padded to the size of a tensor core's operand.
PADDED_ROWS = 16


class ReadoutCall(NamedTuple):
    """The arguments that the readout's kernels have in common.

    Attributes:
        arguments: q, k, v, the terms of the scores, the bounds of the sequences, B, H, R and T, in this order.
        widths: compile-time constants, by name.
        programs: number of programs, one per head, split and sequence.
        splits: number of programs that share the keys of one sequence and head.
        launch_options: numbers of warps and stages, by name.
    """

    arguments: tuple[Any, ...]
    widths: dict[str, int]
    programs: int
    splits: int
    launch_options: dict[str, int]


def prepare(
    pass_: ReadoutPass, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, options: Options
) -> ReadoutCall:
    """Return the common arguments of a pass, with copies only of tensors that the kernels cannot read in place."""
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
        programs=H * splits * B,
        splits=splits,
        # One row reads its tiles directly into registers, so there is nothing to pipeline.
        launch_options={"num_warps": config.num_warps, "num_stages": 1 if R == 1 else config.num_stages},
    )


def launch(
    kernel: Any, programs: int, call: ReadoutCall, arguments: tuple[Any, ...], constants: Mapping[str, Any], q: Tensor
) -> None:
    """Launch a kernel with the common arguments and these; a repeated launch looks up nothing, see ``prepared.py``."""
    given = (*call.arguments, *arguments)
    leaves = list(_leaves(given))
    constants = {**constants, **call.launch_options}
    known = kernel, programs, *(_as_key(x) for x in leaves if not isinstance(x, Tensor)), *constants.items()
    tensors = tuple(x for x in leaves if isinstance(x, Tensor))
    launch_prepared(known, tensors, lambda: Launch(kernel, programs, False, given, constants), q)


def _leaves(argument: tuple[Any, ...]) -> Iterator[Any]:
    for x in argument:
        if isinstance(x, tuple):
            yield from _leaves(x)
        else:
            yield x


def _as_key(x: Any) -> Hashable:
    """Return a key for an argument, which differs for a number and for the same number known at compile time."""
    return (tl.constexpr, x.value) if isinstance(x, tl.constexpr) else x


def readout_argument(x: Tensor) -> Tokens:
    """Return the argument for a (B, R, H, D) tensor, copied if the elements of a row are not adjacent."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    strides = x.stride(0), x.stride(2), x.stride(1)
    return Tokens(x, *strides, known_multiple(*strides))


def number_of_splits(config: ReadoutConfig, max_seqlen: int, sequences_and_heads: int, device: torch.device) -> int:
    """Return the number of programs that share the keys of one sequence and head, without waiting for the device.

    It is the largest number with which all programs run at the same time and each has at least one tile.

    Args:
        config: the configuration of the pass.
        max_seqlen: an upper bound of the sequences' lengths.
        sequences_and_heads: B·H.
        device: the device of the launch.
    """
    available = processors_of(device) * config.programs // max(sequences_and_heads, 1)
    return max(1, min(available, triton.cdiv(max_seqlen, config.block_n)))


def processors_of(device: torch.device) -> int:
    """Return the number of multiprocessors of the chip; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def class_tile(classes: int, head_width: int, dtype: torch.dtype) -> int:
    """Return the number of classes of one program of token relevance.

    A single class is multiplied element by element; more fill a tile.
    """
    if classes == 1:
        return 1
    wide = padded_width(head_width) * dtype.itemsize > 256
    if dtype == torch.float32:
        # float32 products are unrolled into registers, so that wider tiles would spill and wide heads take one class.
        return 1 if wide else 16
    return min(32 if wide else 64, max(16, triton.next_power_of_2(classes)))


def slots(config: ReadoutConfig, head_width: int, dtype: torch.dtype) -> int:
    """Return how many rows of a tile a program's threads hold at once, 16 bytes per thread; see ``tiles.py``."""
    lanes = 64 if torch.version.hip is not None else 32
    threads_of_row = min(lanes, padded_width(head_width) * dtype.itemsize // 16)
    return min(config.block_n, config.num_warps * lanes // threads_of_row)
