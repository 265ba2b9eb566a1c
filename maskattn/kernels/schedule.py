"""Which tile a program works on: the sequences that take longest first, and few programs without work.

A *turn* is one tile of one sequence, for all heads. Sequences of unequal length are sorted on the device, by the length
of the side that passes by, and the programs of one sequence and head stay neighbours, so that its keys stay in the
cache. The host only knows how many turns there can be at most.

Dimension key: B sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.kernels.arguments import VARYING, span_argument
from maskattn.kernels.rows import Rows
from maskattn.kernels.tiles import program_place, sequence_span

__all__ = ["Work", "find_work", "plan_work"]

# Sequences that a program compares with its own at a time.
CHUNK = 1024


class Work(NamedTuple):
    """The turns of one launch.

    Attributes:
        turns_ptr: (turns, 2) int32, the sequence of each turn (−1 for none) and that sequence's first turn; None where
            every sequence has ``tiles`` turns, in order.
        tiles: turns of the longest sequence.
        turns: in all, at most.
    """

    turns_ptr: Tensor | None
    tiles: int
    turns: int


def plan_work(own: Rows, other: Rows, block: int) -> Work:
    """Turns for tiles of ``block`` rows of ``own``, each of which takes as long as its sequence is on ``other``."""
    batch, tiles = own.starts.shape[0], triton.cdiv(own.longest, block)
    if batch * tiles == 0:
        return Work(None, tiles, 0)
    if batch == 1 or (own.all_equal and other.all_equal):
        return Work(None, tiles, batch * tiles)
    turns = batch * tiles if own.total is None else min(batch * tiles, own.total // block + batch)
    table = torch.empty(turns, 2, dtype=torch.int32, device=own.starts.device)
    with torch.cuda.device_of(table):
        schedule_kernel[(batch,)](
            table, span_argument(own), span_argument(other), batch, tiles, turns, BLOCK=block, CHUNK=CHUNK
        )
    return Work(table, tiles, turns)


@triton.jit(do_not_specialize=VARYING)
def schedule_kernel(turns_ptr, own, other, batch, most_tiles, turns, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Write the turns of one sequence; the first program also those that are left over."""
    sequence = tl.program_id(0)
    _, own_length = sequence_span(own.starts_ptr, own.ends_ptr, sequence)
    _, other_length = sequence_span(other.starts_ptr, other.ends_ptr, sequence)
    # A sequence may be longer than the host was told: it has no more tiles than it was given room for.
    own_tiles = tl.minimum(tl.cdiv(own_length, BLOCK), most_tiles)
    first_turn, taken = 0, 0
    for chunk in tl.range(0, batch, CHUNK):
        # [CHUNK]
        place = chunk + tl.arange(0, CHUNK)
        inside = place < batch
        own_lengths = tl.load(own.ends_ptr + place, mask=inside, other=0) - tl.load(
            own.starts_ptr + place, mask=inside, other=0
        )
        other_lengths = tl.load(other.ends_ptr + place, mask=inside, other=0) - tl.load(
            other.starts_ptr + place, mask=inside, other=0
        )
        tiles = tl.minimum(tl.cdiv(own_lengths, BLOCK), most_tiles)
        earlier = (other_lengths > other_length) | ((other_lengths == other_length) & (place < sequence))
        first_turn += tl.sum(tl.where(earlier, tiles, 0), 0)
        taken += tl.sum(tiles, 0)
    for first in tl.range(0, own_tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        written = (tile < own_tiles) & (first_turn + tile < turns)
        tl.store(turns_ptr + 2 * (first_turn + tile), sequence, mask=written)
        tl.store(turns_ptr + 2 * (first_turn + tile) + 1, first_turn, mask=written)
    if sequence == 0:
        for first in tl.range(taken, turns, CHUNK):
            turn = first + tl.arange(0, CHUNK)
            tl.store(turns_ptr + 2 * turn, -1, mask=turn < turns)
            tl.store(turns_ptr + 2 * turn + 1, 0, mask=turn < turns)


@triton.jit
def find_work(turns_ptr, span, tiles, heads, BLOCK: tl.constexpr):
    """Tile, head, sequence, the sequence's start and length (0 where there is nothing to do), and turn of a program."""
    if turns_ptr is not None:
        program = tl.program_id(0)
        sequence = tl.load(turns_ptr + 2 * (program // heads))
        first_turn = tl.load(turns_ptr + 2 * (program // heads) + 1)
        idle = sequence < 0
        sequence = tl.maximum(sequence, 0)
        start, length = sequence_span(span.starts_ptr, span.ends_ptr, sequence)
        length = tl.where(idle, 0, length)
        own_tiles = tl.maximum(tl.cdiv(length, BLOCK), 1)
        within = program - first_turn * heads
        tile, head = within % own_tiles, within // own_tiles
    else:
        tile, head, sequence = program_place(tiles, heads)
        first_turn = sequence * tiles
        start, length = sequence_span(span.starts_ptr, span.ends_ptr, sequence)
    return tile, head, sequence, start, length, first_turn + tile
