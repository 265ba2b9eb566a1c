"""What every launch of a readout kernel hands over, prepared once a call.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from maskattn.kernels.arguments import (
    Tokens,
    bias_argument,
    dropout_argument,
    places_argument,
    slopes_argument,
    span_argument,
    tokens_argument,
)
from maskattn.kernels.configs import padded_width
from maskattn.kernels.readout_configs import ReadoutPass, choose_readout, number_of_splits, slots
from maskattn.kernels.rows import packed_rows, readable
from maskattn.options import Options

__all__ = ["ReadoutCall", "prepare", "readout_argument"]

# One row is multiplied element by element; more are padded to what a tensor core takes.
PADDED_ROWS = 16


class ReadoutCall(NamedTuple):
    """The arguments that the readout's kernels have in common.

    Attributes:
        arguments: q, k, v, key bias, slopes, places of the queries and keys, span of the sequences, dropout,
            scale, B, H, R and T, in this order.
        widths: constexprs.
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
    """The common arguments of a pass; copies nothing that the kernels can read where it lies."""
    B, R, H, D = q.shape
    config = choose_readout(pass_, q.device, D, q.dtype)
    splits = number_of_splits(config, max_seqlen, B * H, q.device)
    return ReadoutCall(
        arguments=(
            readout_argument(q),
            tokens_argument(readable(k)),
            tokens_argument(readable(v)),
            bias_argument(options.key_bias, packed=True),
            slopes_argument(options),
            places_argument(options.coords_q),
            places_argument(options.coords_k),
            span_argument(packed_rows(cu_seqlens, max_seqlen)),
            dropout_argument(options),
            options.scale,
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
        # One row reads its tiles straight into registers, where there is nothing to pipeline.
        launch_options={"num_warps": config.num_warps, "num_stages": 1 if R == 1 else config.num_stages},
    )


def readout_argument(x: Tensor) -> Tokens:
    """Of a (B, R, H, D) tensor, copied if the elements of a row are not side by side."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Tokens(x, x.stride(0), x.stride(2), x.stride(1))
