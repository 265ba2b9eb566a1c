"""The contracts every implementation keeps; the Triton kernels keep them in their own process (tests/kernels)."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_within_budget
from torch import Tensor

from maskattn import Packing, masked_attention, packed_attention, readout
from maskattn.attention import reference

LENGTHS = [[1], [15, 63], [64, 65], [111, 0, 3], [0, 0], [40, 40, 40], [7, 1, 0, 130]]
TORCH_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed_inputs(lengths_q: list[int], lengths_k: list[int], per_head: bool | None, H: int = 2, D: int = 16):
    q, k, v = torch.randn(sum(lengths_q), H, D), torch.randn(sum(lengths_k), H, D), torch.randn(sum(lengths_k), H, D)
    bias = None if per_head is None else torch.randn((sum(lengths_k), H) if per_head else (sum(lengths_k),))
    return [q, k, v, bias], (starts(lengths_q), starts(lengths_k), max(lengths_q), max(lengths_k))


def outputs_and_gradients(attend, inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """out, lse and the gradient of each input, for random cotangents of out and lse."""
    leaves = [None if x is None else x.to(dtype).detach().requires_grad_() for x in inputs]
    out, lse = attend(*leaves)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(lse.dtype)
    finite = lse.masked_fill(lse.isinf(), 0)
    grads = torch.autograd.grad(
        (out * grad_out).sum() + (finite * grad_lse).sum(), [x for x in leaves if x is not None]
    )
    return [out.detach(), lse.detach(), *grads]


def check_against_the_specification(attend, specify, inputs: list[Tensor | None], dtype: torch.dtype) -> None:
    rounded = [None if x is None else x.to(dtype) for x in inputs]
    ours = outputs_and_gradients(attend, rounded, dtype)
    exact = outputs_and_gradients(specify, rounded, torch.float64)
    same = outputs_and_gradients(specify, rounded, dtype)
    for got, truth, rough in zip(ours, exact, same, strict=True):
        assert_within_budget(got, truth, rough)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("per_head", [None, False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_torch_packed_attention_meets_the_specification(lengths, per_head, dtype):
    inputs, where = packed_inputs(lengths, lengths, per_head)
    check_against_the_specification(
        lambda q, k, v, b: packed_attention(q, k, v, *where, key_bias=b, return_lse=True, impl="torch"),
        lambda q, k, v, b: reference.packed_attention(q, k, v, *where[:2], key_bias=b),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("per_head", [None, True])
def test_torch_packed_attention_takes_keys_of_other_lengths_than_queries(per_head):
    inputs, where = packed_inputs([5, 0, 9, 600], [7, 3, 0, 2], per_head)
    check_against_the_specification(
        lambda q, k, v, b: packed_attention(q, k, v, *where, key_bias=b, scale=0.3, return_lse=True, impl="torch"),
        lambda q, k, v, b: reference.packed_attention(q, k, v, *where[:2], key_bias=b, scale=0.3),
        inputs,
        torch.float32,
    )


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("bias", [None, (3, 65), (3, 2, 65)])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_torch_masked_attention_meets_the_specification(kept, bias, skip_queries):
    keep = torch.rand(3, 65) < kept
    inputs = [*(torch.randn(3, 2, 65, 16) for _ in range(3)), None if bias is None else torch.randn(bias)]
    options = {"skip_queries": skip_queries}
    check_against_the_specification(
        lambda q, k, v, b: masked_attention(q, k, v, keep, key_bias=b, return_lse=True, impl="torch", **options),
        lambda q, k, v, b: reference.masked_attention(q, k, v, keep, key_bias=b, **options),
        inputs,
        torch.float32,
    )


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("per_head", [None, False, True])
def test_readout_gives_output_rows_and_lse(impl, per_head):
    lengths = [4, 0, 70]
    inputs, _ = packed_inputs(lengths, lengths, per_head)
    q = torch.randn(3, 5, 2, 16)
    result = readout(
        q, *inputs[1:3], starts(lengths), 70, key_bias=inputs[3], return_rows=True, return_lse=True, impl=impl
    )
    operands = [x if x is None else x.double() for x in (q, *inputs[1:])]
    out, lse, rows = reference.readout(*operands[:3], starts(lengths), key_bias=operands[3])
    for got, expected in zip(result, (out, rows, lse), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    alone = readout(q, *inputs[1:3], starts(lengths), 70, key_bias=inputs[3], impl=impl)
    torch.testing.assert_close(alone, result[0])


def test_readout_rows_are_differentiable():
    q, k, v = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 2, 4), (5, 2, 4), (5, 2, 4)))
    cu_seqlens = starts([2, 3])
    assert torch.autograd.gradcheck(
        lambda q, k, v: readout(q, k, v, cu_seqlens, 3, return_rows=True, return_lse=True, impl="torch"), (q, k, v)
    )


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_query_without_keys_gives_zero_and_minus_infinity_and_no_gradient(impl):
    inputs, where = packed_inputs([3, 4], [0, 2], False)
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = packed_attention(*leaves[:3], *where, key_bias=leaves[3], return_lse=True, impl=impl)
    assert (out[:3] == 0).all()
    assert (lse[:, :3] == float("-inf")).all()
    assert lse[:, 3:].isfinite().all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert (grads[0][:3] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("skip_queries", [True, False])
def test_poisoned_background_never_reaches_an_output_or_a_gradient(impl, poison, skip_queries):
    keep = torch.rand(2, 20) > 0.5
    keep[1] = False
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    bias = torch.randn(2, 20)

    def run(fill: float) -> list[Tensor]:
        dirty = [x.masked_fill(~keep[:, None, :, None], fill) for x in (q, k, v)]
        if not skip_queries:
            dirty[0] = q
        leaves = [x.clone().requires_grad_() for x in (*dirty, bias.masked_fill(~keep, fill))]
        out = masked_attention(*leaves[:3], keep, key_bias=leaves[3], skip_queries=skip_queries, impl=impl)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    clean, poisoned = run(0.0), run(poison)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert all(x.isfinite().all() for x in poisoned)
    background = ~keep[:, None, :, None].expand_as(q)
    for x in poisoned[0 if skip_queries else 2 : 4]:
        assert (x[background] == 0).all()
    assert (poisoned[4][~keep] == 0).all()


@pytest.mark.parametrize("strided", ["transposed", "expanded", "sliced"])
def test_strides_do_not_matter(strided):
    make = {
        "transposed": lambda: torch.randn(2, 30, 16).transpose(0, 1),
        "expanded": lambda: torch.randn(30, 1, 16).expand(30, 2, 16),
        "sliced": lambda: torch.randn(30, 2, 40)[..., 3:19],
    }[strided]
    q, k, v = make(), make(), make()
    where = (starts([10, 20]), starts([10, 20]), 20, 20)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    ours, theirs = packed_attention(*leaves, *where, impl="torch"), packed_attention(*plain, *where, impl="torch")
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), plain), strict=True):
        torch.testing.assert_close(a, b)


def test_same_inputs_give_the_same_bits_forward_and_backward():
    inputs, where = packed_inputs([300, 5, 200], [300, 5, 200], True)

    def attend(q, k, v, bias):
        return packed_attention(q, k, v, *where, key_bias=bias, return_lse=True, impl="torch")

    first = outputs_and_gradients(attend, inputs, torch.float32)
    for _ in range(3):
        again = outputs_and_gradients(attend, inputs, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_lse_asked_for_or_not_the_output_is_the_same():
    inputs, where = packed_inputs([30, 5], [30, 5], None)
    with_lse, _ = packed_attention(*inputs[:3], *where, return_lse=True)
    assert torch.equal(with_lse, packed_attention(*inputs[:3], *where))


def test_gradient_of_the_lse_alone_is_the_softmax():
    (q, k, v, _), where = packed_inputs([6], [4], None)
    bias = torch.zeros(4, 2, requires_grad=True)
    _, lse = packed_attention(q, k, v, *where, key_bias=bias, return_lse=True, impl="torch")
    grad = torch.autograd.grad(lse.sum(), bias)[0]
    softmax = torch.einsum("qhd,khd->qkh", q, k).div(4).softmax(dim=1)
    torch.testing.assert_close(grad, softmax.sum(0))


def test_a_batch_of_nothing_gives_nothing():
    packing = Packing.from_keep(torch.zeros(0, 5, dtype=torch.bool))
    q = torch.randn(0, 2, 16)
    assert packed_attention(q, q, q, packing.cu_seqlens, packing.cu_seqlens, 0, 0).shape == (0, 2, 16)
