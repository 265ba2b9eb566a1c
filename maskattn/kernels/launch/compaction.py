"""Moves of the kept rows of dense tensors to the front of their sequences, and back.

Rows at the front are read like packed rows: in full, aligned tiles, by the copy engine if there is one, and without an
index. Nothing waits for the device: buffers have the size of the dense tensors, and the space after the kept rows is
neither written nor read.

Dimension key: B sequences, N tokens, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.language.tiles import aligned, load_rows, sequence_bounds, store_rows, tile_rows, tokens_base
from maskattn.kernels.launch.arguments import VARYING, bounds_argument, tokens_argument
from maskattn.kernels.launch.rows import Rows, readable
from maskattn.options import Options

__all__ = [
    "from_front",
    "front_rows",
    "move_kernel",
    "options_to_front",
    "to_front",
    "values_from_front",
    "values_to_front",
]

BLOCK_ROWS = 64


@triton.jit(do_not_specialize=VARYING)
def move_kernel(
    source_tokens,
    result_tokens,
    bounds,
    tiles,
    heads,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TO_FRONT: tl.constexpr,
):
    """Move one tile of rows of one head and sequence between their positions and the front."""
    program = tl.program_id(0)
    tile, head, sequence = program % tiles, program // tiles % heads, program // tiles // heads
    start, length = sequence_bounds(bounds.starts_ptr, bounds.ends_ptr, sequence)
    first = tile * BLOCK
    if first >= length:
        return
    source_tokens, result_tokens = aligned(source_tokens), aligned(result_tokens)
    inside = first + tl.arange(0, BLOCK) < length
    position = tile_rows(bounds.index_ptr, start, first, inside, BLOCK, True, True)
    in_order = tl.arange(0, BLOCK)
    # Position 0 at the front is the sequence's row 0 in the buffer.
    nothing = start * 0
    if TO_FRONT:
        source_ptr = tokens_base(source_tokens, sequence, head, start, True)
        result_ptr = tokens_base(result_tokens, sequence, head, nothing, False)
        rows = load_rows(source_ptr, first, position, source_tokens.stride_t, inside, HEAD_WIDTH, BLOCK_D, True, True)
        store_rows(result_ptr, first, in_order, result_tokens.stride_t, inside, rows, HEAD_WIDTH, BLOCK_D, False)
    else:
        source_ptr = tokens_base(source_tokens, sequence, head, nothing, False)
        result_ptr = tokens_base(result_tokens, sequence, head, start, True)
        rows = load_rows(source_ptr, first, in_order, source_tokens.stride_t, inside, HEAD_WIDTH, BLOCK_D, False, True)
        store_rows(result_ptr, first, position, result_tokens.stride_t, inside, rows, HEAD_WIDTH, BLOCK_D, True)


def front_rows(kept: Rows) -> Rows:
    """Return the kept rows as they are after the move to the front."""
    return Rows(torch.zeros_like(kept.starts), kept.ends - kept.starts, None, kept.longest)


def to_front(x: Tensor, kept: Rows) -> Tensor:
    """Return (B, H, N, D) with the kept rows first; the other rows are uninitialised."""
    x = readable(x)
    B, H, N, D = x.shape
    # [B, N, H, D] in memory, with the rows of all heads together as in packed tensors.
    result = torch.empty((B, N, H, D), dtype=x.dtype, device=x.device).transpose(1, 2)
    _move(x, result, kept, True)
    return result


def from_front(x: Tensor, kept: Rows) -> Tensor:
    """Invert :func:`to_front`; the result is contiguous, and 0 where no row was kept."""
    result = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    _move(x, result, kept, False)
    return result


def values_to_front(x: Tensor, kept: Rows, token_axis: int) -> Tensor:
    """Return numbers of tokens, (B, ..., N, ...), with those of the kept tokens first and arbitrary ones after them."""
    return x.gather(token_axis, _index_like(x, kept, token_axis))


def values_from_front(x: Tensor, kept: Rows, fill: float) -> Tensor:
    """Invert :func:`values_to_front` for (B, H, N), with ``fill`` where no token was kept."""
    at_front = torch.arange(x.shape[-1], device=x.device) < (kept.ends - kept.starts)[:, None, None]
    return torch.empty_like(x).scatter_(-1, _index_like(x, kept, 2), x.where(at_front, fill))


def options_to_front(options: Options, queries: Rows | None, keys: Rows) -> Options:
    """Move the options of dense tensors to the front like their rows; ``queries`` is None if queries stay in place."""
    bias, coords_q, coords_k = options.key_bias, options.coords_q, options.coords_k
    return replace(
        options,
        key_bias=None if bias is None else values_to_front(bias, keys, bias.ndim - 1),
        coords_q=coords_q if coords_q is None or queries is None else values_to_front(coords_q, queries, 1),
        coords_k=None if coords_k is None else values_to_front(coords_k, keys, 1),
    )


def _index_like(x: Tensor, kept: Rows, token_axis: int) -> Tensor:
    """Return the kept tokens of each sequence, then the others, in the shape of ``x``."""
    assert kept.index is not None
    shape = [1] * x.ndim
    shape[0], shape[token_axis] = x.shape[0], x.shape[token_axis]
    return kept.index.view(shape).long().expand_as(x)


def _move(source: Tensor, result: Tensor, kept: Rows, to_the_front: bool) -> None:
    B, H, N, D = source.shape
    tiles = triton.cdiv(N, BLOCK_ROWS)
    if tiles * B * H * D == 0:
        return
    with torch.cuda.device_of(source):
        move_kernel[(tiles * H * B,)](
            tokens_argument(source), tokens_argument(result), bounds_argument(kept), tiles, H, HEAD_WIDTH=D,
            BLOCK_D=triton.next_power_of_2(D), BLOCK=BLOCK_ROWS, TO_FRONT=to_the_front,
        )  # fmt: skip
