"""The assignment of tiles to programs: the sequences that take longest come first, and few programs are idle.

An *item* is one tile of one sequence, for all heads. Sequences of unequal length are sorted on the device by the number
of queries or keys that a tile loops over, and the programs of one sequence and head are neighbours, so that its keys
stay in the cache. The host only knows an upper bound of the number of items.

Dimension key: B sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskattn.derived import derived
from maskattn.kernels.language.tiles import program_position, sequence_bounds
from maskattn.kernels.launch.arguments import VARYING, bounds_argument
from maskattn.kernels.launch.prepared import Launch, launch_prepared
from maskattn.kernels.launch.recording import note_constant
from maskattn.kernels.launch.rows import Rows

__all__ = ["CHUNK", "Work", "find_work", "plan_work"]

# Sequences that a program compares with its own at a time.
CHUNK = 1024


class Work(NamedTuple):
    """The items of one launch.

    Attributes:
        items_ptr: (items, 2) int32, the sequence of each item (−1 for none) and that sequence's first item; None if
            every sequence has ``tiles`` items, in order.
        tiles: number of items of the longest sequence.
        items: upper bound of the number of items.
    """

    items_ptr: Tensor | None
    tiles: int
    items: int


def plan_work(own: Rows, other: Rows, block: int, chunk: int = CHUNK) -> Work:
    """Order the tiles of ``block`` rows of ``own``, each of which loops over its sequence's rows of ``other``."""
    batch, tiles = own.batch, triton.cdiv(own.longest, block)
    if batch * tiles == 0:
        return Work(None, tiles, 0)
    if batch == 1 or (own.all_equal and other.all_equal):
        return Work(None, tiles, batch * tiles)
    items = batch * tiles if own.total is None else min(batch * tiles, own.total // block + batch)
    table = _kept_table(own, other, block, chunk, tiles, items)
    note_constant(table)
    return Work(table, tiles, items)


def _kept_table(own: Rows, other: Rows, block: int, chunk: int, tiles: int, items: int) -> Tensor:
    """Return the items in order, cached for all layers with the same lengths or mask on the same stream."""
    ours, theirs = own.source, other.source
    if ours is None or theirs is None:
        return _make_table(own, other, block, chunk, tiles, items)
    kept, of_other = derived(ours), derived(theirs)
    if kept is None or of_other is None:
        return _make_table(own, other, block, chunk, tiles, items)
    stream = torch.cuda.current_stream(own.starts.device).cuda_stream if own.starts.is_cuda else 0
    key = "schedule", own.index is None, id(of_other), other.index is None, block, chunk, tiles, items, stream
    found = kept.get(key)
    # The other cache is kept with the table, so that its id stays unique and stands for the same lengths.
    if found is None:
        found = kept[key] = (
            _make_table(own, other, block, chunk, tiles, items),
            of_other if of_other is not kept else None,
        )
    return found[0]


def _make_table(own: Rows, other: Rows, block: int, chunk: int, tiles: int, items: int) -> Tensor:
    table = torch.empty(items, 2, dtype=torch.int32, device=own.starts.device)
    tensors = table, own.starts, own.ends, own.index, other.starts, other.ends, other.index

    def make() -> Launch:
        arguments = table, bounds_argument(own), bounds_argument(other), own.batch, tiles, items
        return Launch(schedule_kernel, own.batch, False, arguments, {"BLOCK": block, "CHUNK": chunk})

    launch_prepared((schedule_kernel, own.batch, tiles, items, block, chunk), tensors, make, table, True)
    return table


@triton.jit(do_not_specialize=VARYING)
def schedule_kernel(items_ptr, own, other, batch, most_tiles, items, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Write the items of one sequence; the first program also marks the items that are left over as empty."""
    sequence = tl.program_id(0)
    _, own_length = sequence_bounds(own.starts_ptr, own.ends_ptr, sequence)
    _, other_length = sequence_bounds(other.starts_ptr, other.ends_ptr, sequence)
    # A sequence may be longer than the host assumed; its tiles are limited to the space reserved for them.
    own_tiles = tl.minimum(tl.cdiv(own_length, BLOCK), most_tiles)
    first_item, taken = 0, 0
    for chunk in tl.range(0, batch, CHUNK):
        # [CHUNK]
        position = chunk + tl.arange(0, CHUNK)
        inside = position < batch
        own_lengths = tl.load(own.ends_ptr + position, mask=inside, other=0) - tl.load(
            own.starts_ptr + position, mask=inside, other=0
        )
        other_lengths = tl.load(other.ends_ptr + position, mask=inside, other=0) - tl.load(
            other.starts_ptr + position, mask=inside, other=0
        )
        tiles = tl.minimum(tl.cdiv(own_lengths, BLOCK), most_tiles)
        earlier = (other_lengths > other_length) | ((other_lengths == other_length) & (position < sequence))
        first_item += tl.sum(tl.where(earlier, tiles, 0), 0)
        taken += tl.sum(tiles, 0)
    for first in tl.range(0, own_tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        written = (tile < own_tiles) & (first_item + tile < items)
        tl.store(items_ptr + 2 * (first_item + tile), sequence, mask=written)
        tl.store(items_ptr + 2 * (first_item + tile) + 1, first_item, mask=written)
    if sequence == 0:
        for first in tl.range(taken, items, CHUNK):
            item = first + tl.arange(0, CHUNK)
            tl.store(items_ptr + 2 * item, -1, mask=item < items)
            tl.store(items_ptr + 2 * item + 1, 0, mask=item < items)


@triton.jit
def find_work(items_ptr, bounds, tiles, heads, BLOCK: tl.constexpr):
    """Return a program's tile, head, sequence, the sequence's start and length (0 if the program is idle), and item."""
    if items_ptr is not None:
        program = tl.program_id(0)
        sequence = tl.load(items_ptr + 2 * (program // heads))
        first_item = tl.load(items_ptr + 2 * (program // heads) + 1)
        idle = sequence < 0
        sequence = tl.maximum(sequence, 0)
        start, length = sequence_bounds(bounds.starts_ptr, bounds.ends_ptr, sequence)
        length = tl.where(idle, 0, length)
        own_tiles = tl.maximum(tl.cdiv(length, BLOCK), 1)
        within = program - first_item * heads
        tile, head = within % own_tiles, within // own_tiles
    else:
        tile, head, sequence = program_position(tiles, heads)
        first_item = sequence * tiles
        start, length = sequence_bounds(bounds.starts_ptr, bounds.ends_ptr, sequence)
    return tile, head, sequence, start, length, first_item + tile
