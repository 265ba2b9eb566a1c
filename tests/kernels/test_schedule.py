"""Every tile is processed exactly once, and those that take longest come first."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from oracles import cu_seqlens
from torch.utils._python_dispatch import TorchDispatchMode

from maskattn.kernels.launch.arguments import bounds_argument
from maskattn.kernels.launch.rows import kept_rows, packed_rows, whole_rows
from maskattn.kernels.launch.schedule import CHUNK, find_work, plan_work


@triton.jit
def work_kernel(found_ptr, items_ptr, span, tiles, heads, BLOCK: tl.constexpr):
    tile, head, sequence, start, length, item = find_work(items_ptr, span, tiles, heads, BLOCK)
    found = found_ptr + 6 * tl.program_id(0)
    tl.store(found, tile)
    tl.store(found + 1, head)
    tl.store(found + 2, sequence)
    tl.store(found + 3, start)
    tl.store(found + 4, length)
    tl.store(found + 5, item)


def work_of(own, other, heads, device, chunk=CHUNK):
    """Rows (tile, head, sequence, start, length, item) of the programs that have work, in order; and the items."""
    work = plan_work(own, other, 16, chunk)
    found = torch.zeros(work.items * heads, 6, dtype=torch.int32, device=device)
    work_kernel[(len(found),)](found, work.items_ptr, bounds_argument(own), work.tiles, heads, BLOCK=16)
    return [row for row in found.tolist() if row[0] * 16 < row[4]], work


@pytest.mark.parametrize("chunk", [4, CHUNK])
@pytest.mark.parametrize("lengths", [[5, 40, 0, 17, 16, 40], [33, 0], [0, 0, 0]])
@pytest.mark.parametrize("heads", [1, 3])
def test_every_tile_is_found_once_and_the_longest_first(heads, lengths, chunk, device):
    starts = cu_seqlens(lengths).to(device)
    own, other = packed_rows(starts, 64, sum(lengths)), packed_rows(starts, 64)
    rows, work = work_of(own, other, heads, device, chunk)
    expected = {
        (tile, head, b, int(starts[b]), length)
        for b, length in enumerate(lengths)
        for head in range(heads)
        for tile in range(-(-length // 16))
    }
    assert len(rows) == len(expected)
    assert {tuple(row[:5]) for row in rows} == expected
    assert [row[4] for row in rows] == sorted((row[4] for row in rows), reverse=True)
    # A sequence's head is worked on by neighbours, and each head has its own items.
    assert len({(row[1], row[5]) for row in rows}) == len(rows)
    assert all(row[5] < work.items for row in rows)
    assert [row[:3] for row in rows] == sorted(
        (row[:3] for row in rows), key=lambda row: (-lengths[row[2]], row[2], row[1], row[0])
    )


def test_the_length_of_the_inner_loop_decides_what_takes_longest(device):
    own = packed_rows(cu_seqlens([40, 20]).to(device), 40, 60)
    other = packed_rows(cu_seqlens([3, 300]).to(device), 300, 303)
    rows, _ = work_of(own, other, 1, device)
    assert [row[2] for row in rows] == [1, 1, 0, 0, 0]


def test_few_programs_have_nothing_to_do(device):
    lengths = [1000, *[10] * 30]
    own = packed_rows(cu_seqlens(lengths).to(device), 1000, sum(lengths))
    work = plan_work(own, own, 16)
    assert work.items <= sum(-(-length // 16) for length in lengths) + len(lengths)


def test_equal_lengths_need_no_order(device):
    equal = packed_rows(cu_seqlens([20, 20]).to(device), 20, 40)
    unequal = packed_rows(cu_seqlens([20, 19]).to(device), 20, 39)
    alone = packed_rows(cu_seqlens([20]).to(device), 500, 20)
    kept = kept_rows(torch.ones(2, 20, dtype=torch.bool, device=device))
    assert plan_work(equal, equal, 16).items_ptr is None
    assert plan_work(whole_rows(2, 20, torch.device(device)), equal, 16).items_ptr is None
    assert plan_work(alone, alone, 16) == (None, 2, 2)
    assert plan_work(equal, unequal, 16).items_ptr is not None
    assert plan_work(kept, kept, 16).items_ptr is not None


@pytest.mark.parametrize("tokens", [0, 1, 7, 200])
def test_kept_rows_come_first_and_in_their_order_found_without_a_sort(tokens):
    keep = torch.rand(5, tokens, generator=torch.Generator().manual_seed(tokens)) < 0.4
    with CountedSorts() as counted:
        rows = kept_rows(keep)
    expected = [[*row.nonzero()[:, 0].tolist(), *(~row).nonzero()[:, 0].tolist()] for row in keep]
    assert rows.index.view(5, tokens).tolist() == expected
    assert (rows.ends - rows.starts).tolist() == keep.sum(1).tolist()
    assert counted.names == []


class CountedSorts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("sort", "nonzero", "_local_scalar_dense")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
