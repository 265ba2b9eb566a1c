"""Packing and unpacking in C++ against torch's indexing, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ROW_DTYPES
from torch import Tensor

from maskattn import Packing, _native, native_packing, pack, packing, unpack


@pytest.fixture(autouse=True)
def no_thresholds(monkeypatch):
    """Give the extension even the calls at which torch would be quicker."""
    for name in ("ROW_BYTES", "GATHER_BYTES", "SCATTER_ROWS"):
        monkeypatch.setattr(native_packing, name, 0)


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Arbitrary bits, NaN included, for a dtype that has so many."""
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    wide = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return wide.view(dtype).view(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


def bytes_of(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def some_packing(shape: tuple[int, int] = (3, 41)) -> Packing:
    return Packing.from_keep(torch.rand(shape) > 0.4)


def expected_rows(x: Tensor, places: Packing) -> Tensor:
    # One by one, since torch cannot index every dtype.
    rows = [x.flatten(0, 1)[i] for i in places.indices.tolist()]
    return torch.stack(rows) if rows else x.new_zeros((0, *x.shape[2:]))


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
def test_every_dtype_is_moved_bit_for_bit(dtype):
    places, x = some_packing(), numbers((3, 41, 2, 5), dtype)
    rows = native_packing.gather_rows(x.flatten(0, 1), places.indices)
    assert rows.is_contiguous()
    assert same_bits(rows, expected_rows(x, places))
    dense = native_packing.scatter_rows(rows, places.row_of_token)
    kept = places.row_of_token >= 0
    assert same_bits(dense[kept], rows)
    assert not any(bytes_of(dense[~kept]))


def test_lazily_conjugated_and_negated_numbers_are_what_they_stand_for():
    places, x = some_packing(), numbers((3, 41, 4), torch.complex64).nan_to_num()
    for y in (x.conj(), x.conj().imag):
        assert torch.equal(pack(y, places), expected_rows(y.resolve_conj().resolve_neg(), places))


@pytest.mark.parametrize("rest", [(), (1,), (3,), (64,), (6, 32), (1100,), (2, 3, 5), (0,), (2, 0)], ids=str)
def test_whatever_follows_the_tokens(rest):
    places, x = some_packing(), numbers((3, 41, *rest), torch.float32)
    rows = native_packing.gather_rows(x.flatten(0, 1), places.indices)
    assert same_bits(rows, x.flatten(0, 1).index_select(0, places.indices))
    dense = native_packing.scatter_rows(rows, places.row_of_token)
    assert same_bits(dense, torch.zeros_like(dense).index_copy_(0, places.indices, rows))


# Views of (rows, 2, 6), and whether the extension reads them in place.
LAYOUTS = {
    "of_three": (lambda x: torch.stack([x, x + 1, x + 2], dim=1)[:, 1], True),
    "every_other_row": (lambda x: torch.stack([x, x + 1], dim=1).flatten(0, 1)[::2], True),
    "one_row": (lambda x: x[:1].expand_as(x), True),
    "one_column_of_many": (lambda x: x[:, :1, :1], True),
    "of_wide_rows": (lambda x: torch.cat([x, x], dim=2).flatten(1)[:, 3:15].unflatten(1, (2, 6)), True),
    "every_other_column": (lambda x: torch.stack([x, x + 1], dim=-1)[..., 0], False),
    "one_column": (lambda x: x[..., :1].expand_as(x), False),
    "columns_first": (lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_without_gaps_are_read_where_they_lie(layout, monkeypatch):
    relayout, in_place = LAYOUTS[layout]
    places, calls = some_packing(), []
    x = relayout(numbers((123, 2, 6), torch.float32))
    rows = relayout(numbers((places.total, 2, 6), torch.float32))
    # The contract here is which memory the extension gets: a copy would give the same values.
    native = native_packing._move
    monkeypatch.setattr(native_packing, "_move", lambda *args, **how: calls.append(args[0]) or native(*args, **how))
    gathered = packing.gather_rows(x, places.indices, places.row_of_token)
    dense = packing.scatter_rows(rows, places.indices, places.row_of_token)
    assert same_bits(gathered, x.index_select(0, places.indices))
    assert same_bits(dense, torch.zeros(123, *rows.shape[1:]).index_copy_(0, places.indices, rows))
    assert [call.data_ptr() for call in calls] == ([x.data_ptr(), rows.data_ptr()] if in_place else [])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 5)])
def test_nothing_and_everything_kept(shape, kept):
    places, x = Packing.from_keep(torch.full(shape, kept)), torch.randn(*shape, 3)
    rows = pack(x, places)
    assert rows.shape == (shape[0] * shape[1] * kept, 3)
    assert torch.equal(unpack(rows, places), x * kept)


def test_background_is_never_read_and_has_gradient_zero():
    keep = torch.rand(2, 300) > 0.7
    x = torch.where(keep[..., None], torch.randn(2, 300, 96), float("nan")).requires_grad_()
    places = Packing.from_keep(keep)
    unpack(pack(x, places) * 2, places).sum().backward()
    assert torch.equal(x.grad, 2.0 * keep[..., None].expand_as(x))


def test_gradients_and_their_gradients_are_exact():
    places = Packing.from_keep(torch.tensor([[True, False, True], [False, True, False]]))
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        return unpack(pack(x, places).sin(), places)

    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.autograd.gradgradcheck(there_and_back, x)


def test_the_ops_pass_opcheck():
    places = some_packing((2, 5))
    x, rows = torch.randn(10, 3, 2, requires_grad=True), torch.randn(places.total, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.maskattn.gather_rows.default, (x, places.indices, places.row_of_token))
    torch.library.opcheck(torch.ops.maskattn.scatter_rows.default, (rows, places.indices, places.row_of_token))


def test_background_is_zero_in_memory_that_held_other_values():
    places, x = some_packing((1, 4096)), torch.randn(1, 4096, 384)
    rows = pack(x, places)
    expected = rows.new_zeros(4096, 384).index_copy_(0, places.indices, rows)[None]
    for _ in range(3):
        torch.full((1, 4096, 384), torch.nan)  # freed at once
        assert torch.equal(unpack(rows, places), expected)


@pytest.mark.parametrize("tokens", [40, 60_000])
def test_rows_and_results_can_be_resized_afterwards(tokens):
    places, x = some_packing((1, tokens)), torch.randn(1, tokens, 160)
    rows = pack(x, places)
    for tensor in (unpack(rows, places), rows, x):
        tensor.resize_(2 * tensor.numel())


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_result_does_not_depend_on_the_threads(threads):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (3000, 1536), np.uint8)
    index = rng.integers(-1, 3000, 7000)
    result = np.full((7000, 1536), 7, np.uint8)
    _native.move_rows(source, index, result, threads=threads)
    assert np.array_equal(result, np.where(index[:, None] < 0, 0, source[index]))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("wrong", [-2, 300, 2**31 - 1])
def test_an_index_out_of_range_is_named(dtype, threads, wrong):
    source, result = np.zeros((300, 4096), np.uint8), np.empty((1000, 4096), np.uint8)
    index = np.zeros(1000, dtype)
    index[[613, 999]] = wrong
    with pytest.raises(ValueError, match=rf"below 300, or -1 for zeros, got index\[613\]={wrong}; use the Packing"):
        _native.move_rows(source, index, result, threads=threads)


def test_a_packing_made_by_hand_that_points_too_far_is_refused():
    far = torch.tensor([0, 7])
    with pytest.raises(ValueError, match=r"got index\[1\]=7"):
        packing.gather_rows(torch.randn(6, 3), far, torch.zeros(6, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"got index\[0\]=2"):
        packing.scatter_rows(torch.randn(2, 3), far, torch.full((6,), 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"source": np.zeros((4, 3))}, TypeError, "source of dtype uint8"),
        ({"source": np.zeros((4, 6), np.uint8)[:, ::2]}, ValueError, "source contiguous along its last axis"),
        ({"source": np.zeros((4, 2), np.uint8)}, ValueError, r"result of shape .* = \(5, 2\)"),
        ({"index": np.zeros(5)}, TypeError, "index of dtype int64 or int32"),
        ({"index": np.zeros(10, np.int64)[::2]}, ValueError, "index contiguous"),
        ({"result": np.broadcast_to(np.zeros(3, np.uint8), (5, 3))}, ValueError, "can be written to"),
        ({"result": np.zeros((5, 6), np.uint8)[:, ::2]}, ValueError, "result contiguous along its last axis"),
        ({"threads": -1}, ValueError, "threads >= 0, got threads=-1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(changed, error, message):
    index = np.zeros(5, np.int64)
    right = {"source": np.zeros((4, 3), np.uint8), "index": index, "result": np.empty((5, 3), np.uint8)}
    _native.move_rows(**right)
    with pytest.raises(error, match=message):
        _native.move_rows(**(right | changed))


def test_rows_of_a_result_may_lie_apart_but_not_on_one_another():
    source, wide = np.arange(12, dtype=np.uint8).reshape(4, 3), np.full((5, 8), 9, np.uint8)
    _native.move_rows(source, np.array([3, -1, 0, 1, 2]), wide[:, 2:5])
    assert np.array_equal(wide[:, 2:5], [source[3], [0, 0, 0], source[0], source[1], source[2]])
    assert (np.delete(wide, [2, 3, 4], axis=1) == 9).all()
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(20, np.uint8), (5, 3), (2, 1))
    with pytest.raises(ValueError, match="each have a place of their own"):
        _native.move_rows(source, np.zeros(5, np.int64), overlapping)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.integers(0, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_kept_tokens_are_those_that_torch_finds(B, N, share, seed):
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < share
    found = Packing.from_keep(keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "has_extension", lambda: False)
        expected = Packing.from_keep(keep)
    for name in ("indices", "cu_seqlens", "row_of_token"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert (found.max_seqlen, found.batch_size, found.num_tokens) == (expected.max_seqlen, B, N)


def test_masks_of_any_strides_are_read():
    keep = torch.rand(5, 7) > 0.5
    for strided in (keep.T, keep[:, ::2], keep[:1].expand(4, 7)):
        assert torch.equal(Packing.from_keep(strided).indices, strided.flatten().nonzero().flatten())


def test_a_mask_that_functorch_tracks_is_read_by_torch():
    places = []

    def loss(x: Tensor) -> Tensor:
        places.append(Packing.from_keep(x.detach() > 0))
        return x.sum()

    torch.func.grad(loss)(torch.tensor([[1.0, -1.0, 2.0]]))
    assert places[0].max_seqlen == 2


FORK = """
import os
import torch
from maskattn import Packing, pack, unpack
torch.set_num_threads(2)
# Of a size that the extension packs: torch's own functions do not return in such a child.
x, packing = torch.randn(1, 40000, 384), Packing.from_keep(torch.rand(1, 40000) > 0.3)

def run():
    return unpack(pack(x, packing), packing).numpy().tobytes()

expected = torch.where((packing.row_of_token >= 0)[:, None], x[0], 0).numpy().tobytes()
assert run() == expected
child = os.fork()
if child == 0:
    os._exit(0 if run() == expected else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_child_packs_too():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
