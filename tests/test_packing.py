from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskattn import Packing, pack, packing, unpack


@pytest.fixture(autouse=True, params=[False, True], ids=["torch", "extension"])
def where_there_is_an_extension(request, monkeypatch):
    """The whole file with the C++ extension, where it is built, and without."""
    if request.param and not packing.has_extension():
        pytest.skip("the C++ extension is not built")
    monkeypatch.setattr(packing, "has_extension", lambda: request.param)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 9), st.integers(0, 2**31))
def test_packing_lists_the_kept_tokens_sequence_by_sequence(B, N, seed):
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) > 0.5
    packing = Packing.from_keep(keep)
    lengths = [int(row.sum()) for row in keep]
    assert packing.indices.tolist() == [b * N + n for b in range(B) for n in range(N) if keep[b, n]]
    assert packing.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(B + 1)]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == max(lengths, default=0)
    assert packing.total == sum(lengths)
    assert packing.sequence_of_token.tolist() == [b for b in range(B) for _ in range(lengths[b])]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31))
def test_unpack_undoes_pack_and_puts_zero_elsewhere(B, N, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(B, N, generator=generator) > 0.5
    x = torch.randn(B, N, 2, 3, generator=generator)
    packing = Packing.from_keep(keep)
    rows = pack(x, packing)
    assert torch.equal(rows, x[keep])
    assert torch.equal(unpack(rows, packing), x * keep[:, :, None, None])


def test_background_is_never_read_and_has_gradient_zero():
    keep = torch.tensor([[True, False, True], [False, False, True]])
    x = torch.where(keep[..., None], torch.randn(2, 3, 4), float("nan")).requires_grad_()
    packing = Packing.from_keep(keep)
    unpack(pack(x, packing) * 2, packing).sum().backward()
    assert torch.equal(x.grad, 2.0 * keep[..., None].expand(2, 3, 4))


def test_pack_and_unpack_have_exact_gradients():
    packing = Packing.from_keep(torch.rand(2, 5) > 0.4)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(pack(x, packing).sin(), packing), x)


def test_strided_and_expanded_inputs_pack_alike():
    packing = Packing.from_keep(torch.rand(3, 5) > 0.4)
    x = torch.randn(5, 3, 4)
    assert torch.equal(pack(x.transpose(0, 1), packing), pack(x.transpose(0, 1).contiguous(), packing))
    expanded = torch.randn(1, 5, 4).expand(3, 5, 4)
    assert torch.equal(pack(expanded, packing), pack(expanded.contiguous(), packing))


def test_packing_moves_between_devices_whole():
    packing = Packing.from_keep(torch.rand(2, 5) > 0.4)
    moved = packing.to("meta")
    assert moved.indices.is_meta
    assert moved.cu_seqlens.is_meta
    assert (moved.max_seqlen, moved.batch_size, moved.num_tokens) == (packing.max_seqlen, 2, 5)


def test_wrong_masks_and_tensors_are_named():
    with pytest.raises(TypeError, match=r"keep\.dtype=torch\.float32"):
        Packing.from_keep(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"got keep\.shape=\(2, 3, 4\)"):
        Packing.from_keep(torch.ones(2, 3, 4, dtype=torch.bool))
    packing = Packing.from_keep(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"= \(2, 3, \.\.\.\).*got x\.shape=\(2, 4, 1\)"):
        pack(torch.ones(2, 4, 1), packing)
    with pytest.raises(ValueError, match=r"T=6 kept tokens, got rows\.shape=\(5, 1\)"):
        unpack(torch.ones(5, 1), packing)


def test_each_token_knows_its_row():
    keep = torch.tensor([[True, False, True], [False, False, True]])
    packing = Packing.from_keep(keep)
    assert packing.row_of_token.tolist() == [0, -1, 1, -1, -1, 2]
    assert packing.row_of_token.dtype == torch.int32
    # A packing made by hand finds out.
    by_hand = Packing(packing.indices, packing.cu_seqlens, 2, 2, 3)
    assert torch.equal(by_hand.row_of_token, packing.row_of_token)
    assert by_hand.row_of_token.dtype == torch.int32


def test_the_ops_pass_opcheck():
    packing = Packing.from_keep(torch.rand(2, 5) > 0.4)
    places = packing.indices, packing.row_of_token
    x, rows = torch.randn(10, 3, 2, requires_grad=True), torch.randn(packing.total, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.maskattn.gather_rows.default, (x, *places))
    torch.library.opcheck(torch.ops.maskattn.scatter_rows.default, (rows, *places))


def test_compiles_whole_with_a_packing_as_input():
    def there_and_back(x: torch.Tensor, packing: Packing) -> torch.Tensor:
        within = Packing(packing.indices, packing.cu_seqlens, packing.max_seqlen, 2, 5)
        return unpack(pack(x, packing).sin(), within)

    torch._dynamo.reset()
    packing, x = Packing.from_keep(torch.rand(2, 5) > 0.4), torch.randn(2, 5, 3, requires_grad=True)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x, packing)
    eager = there_and_back(x, packing)
    assert torch.equal(compiled, eager)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (compiled, eager)))


def test_dtypes_that_are_not_floating_pack_too():
    packing = Packing.from_keep(torch.tensor([[True, False, True]]))
    for x in (torch.tensor([[True, True, False]]), torch.tensor([[3, 4, 5]]), torch.tensor([[1j, 2j, 3j]])):
        assert torch.equal(pack(x, packing), x[0, [0, 2]])
        assert torch.equal(unpack(pack(x, packing), packing), x * torch.tensor([1, 0, 1]).to(x.dtype))
