"""The arguments of the kernels: tensors with their strides, each as a single argument.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import triton.language as tl
from torch import Tensor

from maskattn.dropout import dropout_threshold
from maskattn.kernels.language.bundles import (
    NO_POSITIONS,
    Bounds,
    Dropout,
    Positions,
    RowValues,
    Tokens,
    Width,
)
from maskattn.kernels.language.scores import Terms
from maskattn.kernels.launch.recording import allocate
from maskattn.kernels.launch.rows import MAX_BLOCK, Rows, bias_strides_bht, lse_strides_bh, strides_bht
from maskattn.kernels.tables.config import Config
from maskattn.kernels.tables.lookup import split_width
from maskattn.options import Options

__all__ = [
    "OPTIONS",
    "VARYING",
    "WITH_REST",
    "bounds_argument",
    "constant_arguments",
    "dropout_argument",
    "empty_rest",
    "keeps_rest",
    "known_multiple",
    "known_strides",
    "rest_argument",
    "row_values_argument",
    "tensors_of",
    "terms_argument",
    "tokens_argument",
]


# Numbers that change from call to call; Triton would compile again if one became 1 or a multiple of 16.
# Tuples cannot be listed here: Triton specialises on each of their strides, few of which depend on the lengths.
VARYING = (
    "batch",
    "class_tiles",
    "classes",
    "count",
    "heads",
    "longest",
    "most_tiles",
    "queries",
    "row_steps",
    "rows",
    "splits",
    "tiles",
    "tokens",
    "items",
)


_KNOWN_ZERO = tl.constexpr(0)
_EIGHT = tl.constexpr(8)

# The options that terms_argument passes to the kernels.
OPTIONS = frozenset(
    {
        "scale",
        "key_bias",
        "slopes",
        "coords_q",
        "coords_k",
        "dropout_p",
        "dropout_seed",
        "precision",
        "deterministic",
        "query_offsets",
        "key_offsets",
    }
)

# With these, lse has a rest, and the scores of attention are natural.
WITH_REST = frozenset({"key_bias"})


def tensors_of(options: Options) -> tuple[Tensor | None, ...]:
    """Return the options that are tensors, None for those that are not given."""
    of_scores = options.key_bias, options.slopes, options.coords_q, options.coords_k
    return *of_scores, options.dropout_seed, options.query_offsets, options.key_offsets


def keeps_rest(options: Options) -> bool:
    """Return whether forward computes the rest of lse for backward."""
    return any(getattr(options, name) is not None for name in WITH_REST)


def empty_rest(lse: Tensor, options: Options, fill: float | None = None) -> Tensor:
    """Return a tensor for the rest of lse, of lse's shape, or of shape (0,) if it is not kept; see :func:`allocate`."""
    return allocate(lse.shape if keeps_rest(options) else (0,), lse.dtype, lse.device, fill)


def known_strides(*strides: int) -> tuple[Any, ...]:
    """Return the strides, with those of 0 (a missing or shared dimension) as compile-time constants."""
    return tuple([stride or _KNOWN_ZERO for stride in strides])


def known_multiple(*strides: int) -> Any:
    """Return 8 if the strides are multiples of 8 but not all of 16, which Triton's launcher detects itself; else None.

    This is so for head widths such as 72; a thread reads eight elements at a time.
    """
    eights = all(stride % 8 == 0 for stride in strides)
    return _EIGHT if eights and any(stride % 16 for stride in strides) else None


def tokens_argument(x: Tensor) -> Tokens:
    """Return the argument for a packed (T, H, D) or a dense (B, H, N, D) tensor."""
    strides = strides_bht(x)
    stride_b, stride_h, stride_t = known_strides(*strides)
    return Tokens(x, stride_b, stride_h, stride_t, known_multiple(*strides))


def row_values_argument(x: Tensor | None) -> RowValues:
    """Return the argument for a contiguous (H, Tq) or (B, H, Nq) tensor."""
    return RowValues(None, 0, 0) if x is None else RowValues(x, *known_strides(*lse_strides_bh(x)))


def rest_argument(x: Tensor) -> RowValues:
    """Return the argument for the rest of lse, of lse's shape; absent if it is not kept."""
    return row_values_argument(x if x.ndim > 1 else None)


def terms_argument(options: Options, packed: bool, natural: bool, scale: float | None = None) -> Terms:
    """Return the argument for the terms of the scores besides q·k.

    Args:
        options: the options of the call.
        packed: whether the tensors are packed or dense.
        natural: whether scores are in natural units; otherwise they are in units of log2, and the scale includes it.
        scale: a scale that replaces the options'.
    """
    scale = options.scale if scale is None else scale
    return Terms(
        scale=scale if natural else scale * math.log2(math.e),
        key_bias=bias_argument(options.key_bias, packed),
        slopes=None if options.slopes is None else options.slopes.contiguous(),
        coords_q=positions_argument(options.coords_q),
        coords_k=positions_argument(options.coords_k),
        dropout=dropout_argument(options),
    )


def bias_argument(key_bias: Tensor | None, packed: bool) -> Tokens:
    """Return the argument for a key bias: (Tk,) or (Tk, H) of packed tensors, (B, N) or (B, H, N) of dense ones."""
    return Tokens(key_bias, *known_strides(*bias_strides_bht(key_bias, packed)))


def positions_argument(coords: Tensor | None) -> Positions:
    """Return the argument for (T, 2) or (B, N, 2) coordinates."""
    if coords is None:
        return NO_POSITIONS
    if coords.stride(-2) * MAX_BLOCK >= 2**31:
        coords = coords.contiguous()
    stride_b = 0 if coords.ndim == 2 else coords.stride(0)
    if coords.stride()[-2:] == (2, 1):
        # The layout of nearly all coordinates; its strides are constants.
        return Positions(coords, known_strides(stride_b)[0], tl.constexpr(2), 1)
    return Positions(coords, *known_strides(stride_b, *coords.stride()[-2:]))


def bounds_argument(rows: Rows) -> Bounds:
    """Return the argument for the rows of the queries or of the keys."""
    return Bounds(rows.starts, rows.ends, rows.index)


def dropout_argument(options: Options) -> Dropout:
    """Return the argument for dropout; its seed is None without dropout."""
    threshold = dropout_threshold(options.dropout_p)
    # A signed number of the same bits fits 32 bits for every dropout_p, so that all of them share a compiled kernel.
    signed = threshold - 2**32 if threshold >= 2**31 else threshold
    offsets = (x if x is None else x.contiguous() for x in (options.query_offsets, options.key_offsets))
    return Dropout(options.dropout_seed, signed, 1 / (1 - options.dropout_p), *offsets)


@functools.cache
def constant_arguments(head_width: int, config: Config, described: bool) -> Mapping[str, Any]:
    """Return a kernel's constants by name, and its launch parameters."""
    return {
        # Each head width is compiled separately.
        "WIDTH": Width(*(tl.constexpr(x) for x in (head_width, *split_width(head_width, config), config.precision))),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "DESCRIBED": described,
        "TAIL_STAGES": 1 if config.plain_tail else None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # An option of NVIDIA's assembler alone.
        **({"maxnreg": config.max_registers} if config.all_registers else {}),
    }
