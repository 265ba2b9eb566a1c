"""What the launchers hand to the kernels: tensors with their strides, bundled so that each is one argument.

A pointer of None is absent, which the kernels know when they are compiled.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from maskattn.kernels.configs import Config, split_width
from maskattn.kernels.rows import MAX_BLOCK, Rows, bias_strides_bht, lse_strides_bh, strides_bht
from maskattn.options import Options

__all__ = [
    "ABSENT",
    "Dropout",
    "Keys",
    "Noise",
    "Places",
    "Queries",
    "RowValues",
    "Span",
    "Tokens",
    "VARYING",
    "Width",
    "bias_argument",
    "constant_arguments",
    "dropout_argument",
    "known_strides",
    "places_argument",
    "rest_argument",
    "row_values_argument",
    "scale_argument",
    "slopes_argument",
    "span_argument",
    "tokens_argument",
]


class Tokens(NamedTuple):
    """A tensor by sequence, head and token; what lies along the head width is contiguous."""

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any


class RowValues(NamedTuple):
    """A contiguous tensor with one number for each sequence, head and query."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class Places(NamedTuple):
    """Two coordinates of each token."""

    ptr: Any
    stride_b: Any
    stride_t: Any
    stride_c: Any


class Span(NamedTuple):
    """The device's part of :class:`~maskattn.kernels.rows.Rows`."""

    starts_ptr: Any
    ends_ptr: Any
    index_ptr: Any


class Dropout(NamedTuple):
    """The seed, the words below which a weight is dropped (the bits of an unsigned number), and 1/(1 − dropout_p)."""

    seed_ptr: Any
    threshold: Any
    factor: Any


class Noise(NamedTuple):
    """What the random words of one program have in common."""

    low: Any
    high: Any
    threshold: Any
    factor: Any
    head: Any
    sequence: Any


class Width(NamedTuple):
    """Columns of a tile: HEAD count; they lie in a part of FIRST and, unless SECOND is 0, one of SECOND columns."""

    HEAD: Any
    FIRST: Any
    SECOND: Any


class Keys(NamedTuple):
    """The keys of one sequence and head, as a pass over them reads them."""

    k: Any
    v: Any
    bias_ptr: Any
    places_ptr: Any
    index_ptr: Any
    start: Any
    stride_kt: Any
    stride_vt: Any
    stride_bt: Any
    stride_ct: Any
    stride_cc: Any


class Queries(NamedTuple):
    """The queries of one sequence and head, as a pass over them reads them."""

    q: Any
    dout: Any
    lse_ptr: Any
    lse_rest_ptr: Any
    delta_ptr: Any
    places_ptr: Any
    index_ptr: Any
    start: Any
    stride_qt: Any
    stride_gt: Any
    stride_ct: Any
    stride_cc: Any


ABSENT = Tokens(None, 0, 0, 0)

# Numbers of the kernels that change from call to call; Triton would compile anew where one is 1 or a multiple of 16.
# Tuples cannot be listed here: their strides are looked at one by one, of which few change with the lengths.
VARYING = (
    "batch",
    "class_tiles",
    "classes",
    "count",
    "heads",
    "longest",
    "most_tiles",
    "queries",
    "rows",
    "splits",
    "tiles",
    "tokens",
    "turns",
)


def known_strides(*strides: int) -> tuple[Any, ...]:
    """The strides, those of 0 (no such dimension, or one that is shared) known when a kernel is compiled."""
    return tuple(tl.constexpr(0) if stride == 0 else stride for stride in strides)


def tokens_argument(x: Tensor) -> Tokens:
    """Of a packed (T, H, D) or a dense (B, H, N, D) tensor."""
    return Tokens(x, *known_strides(*strides_bht(x)))


def row_values_argument(x: Tensor | None) -> RowValues:
    """Of a contiguous (H, Tq) or (B, H, Nq) tensor."""
    return RowValues(None, 0, 0) if x is None else RowValues(x, *known_strides(*lse_strides_bh(x)))


def rest_argument(x: Tensor) -> RowValues:
    """Of the rest of lse, shaped as that is; absent where the implementation keeps none."""
    return row_values_argument(x if x.ndim > 1 else None)


def scale_argument(scale: float, options: Options) -> float:
    """The scale in units of the scores, which are natural with a key bias and else those of log2."""
    return scale if options.key_bias is not None else scale * math.log2(math.e)


def bias_argument(key_bias: Tensor | None, packed: bool) -> Tokens:
    """Of a key bias: (Tk,) or (Tk, H) of packed tensors, (B, N) or (B, H, N) of dense ones."""
    return Tokens(key_bias, *known_strides(*bias_strides_bht(key_bias, packed)))


def places_argument(coords: Tensor | None) -> Places:
    """Of (T, 2) or (B, N, 2) coordinates."""
    if coords is None:
        return Places(None, 0, 0, 0)
    if coords.stride(-2) * MAX_BLOCK >= 2**31:
        coords = coords.contiguous()
    stride_b = 0 if coords.ndim == 2 else coords.stride(0)
    if coords.stride()[-2:] == (2, 1):
        # As nearly all coordinates lie, so these strides need not be arguments.
        return Places(coords, known_strides(stride_b)[0], tl.constexpr(2), 1)
    return Places(coords, *known_strides(stride_b, *coords.stride()[-2:]))


def slopes_argument(options: Options) -> Tensor | None:
    """(H,) contiguous, or None."""
    return None if options.slopes is None else options.slopes.contiguous()


def span_argument(rows: Rows) -> Span:
    """Of one side's rows."""
    return Span(rows.starts, rows.ends, rows.index)


def dropout_argument(options: Options) -> Dropout:
    """Of the options; its seed is None where nothing is dropped."""
    threshold = min(round(options.dropout_p * 2**32), 2**32 - 1)
    # The same bits whatever the share, so that no share has a kernel of its own.
    signed = threshold - 2**32 if threshold >= 2**31 else threshold
    return Dropout(options.dropout_seed, signed, 1 / (1 - options.dropout_p))


def constant_arguments(head_width: int, config: Config, described: bool) -> dict[str, Any]:
    """What a kernel is compiled for, by name, and how it is launched."""
    return {
        # Each head width has code of its own.
        "WIDTH": Width(*(tl.constexpr(x) for x in (head_width, *split_width(head_width, config)))),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "DESCRIBED": described,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
