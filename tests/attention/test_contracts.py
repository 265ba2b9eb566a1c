"""The contracts every implementation keeps; the Triton kernels keep them in their own process (tests/kernels)."""

from __future__ import annotations

import importlib.util

import oracles
import pytest
import torch
from torch import Tensor

from maskattn import Packing, masked_attention, packed_attention, readout
from maskattn.attention import reference
from maskattn.attention.ops import flat_options
from maskattn.options import Options

LENGTHS = [[1], [15, 63], [64, 65], [111, 0, 3], [0, 5, 0], [40, 40, 40], [7, 1, 0, 130]]
TORCH_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FUSED = ["torch", *(["cpu"] if importlib.util.find_spec("maskattn._native") else [])]
BIASES = [None, "shared", "per_head"]


def attend_packed(lengths_q: list[int], lengths_k: list[int], impl: str = "torch"):
    """The public operation, as oracles.run_reference calls an implementation."""
    where = oracles.cu_seqlens(lengths_q), oracles.cu_seqlens(lengths_k), max(lengths_q), max(lengths_k)

    def attend(q, k, v, options):
        arguments = q, k, v, *where, *flat_options(options), True, impl
        return torch.ops.maskattn.packed_attention(*arguments)

    return attend


def check_packed(inputs: oracles.Inputs, lengths_q: list[int], lengths_k: list[int]) -> None:
    results = oracles.run_reference(attend_packed(lengths_q, lengths_k), inputs, inputs.q.dtype)
    inputs = inputs.to(inputs.q.dtype)  # the bias too, as the results above had it
    oracles.assert_meets_specification(
        results, inputs, oracles.specify_packed(oracles.cu_seqlens(lengths_q), oracles.cu_seqlens(lengths_k))
    )


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_torch_packed_attention_meets_the_specification(lengths, bias, dtype):
    check_packed(oracles.packed_inputs(lengths, bias=bias, dtype=dtype, head_width=16), lengths, lengths)


@pytest.mark.parametrize("bias", [None, "per_head"])
def test_torch_packed_attention_takes_keys_of_other_lengths_than_queries(bias):
    lengths_q, lengths_k = [5, 0, 9, 600], [7, 3, 0, 2]
    check_packed(oracles.packed_inputs(lengths_q, lengths_k, bias=bias, scale=0.3), lengths_q, lengths_k)


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", ["random", "blob", "all", "none", "one"])
def test_torch_masked_attention_meets_the_specification(kind, bias, skip_queries):
    inputs, keep = oracles.masked_inputs(3, 65, bias=bias, head_width=16), oracles.keep_mask(kind, 3, 65)

    def attend(q, k, v, options):
        return torch.ops.maskattn.masked_attention(q, k, v, keep, skip_queries, *flat_options(options), True, "torch")

    oracles.assert_meets_specification(
        oracles.run_reference(attend, inputs, torch.float32), inputs, oracles.specify_masked(keep, skip_queries)
    )


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
@pytest.mark.parametrize("bias", BIASES)
def test_readout_gives_output_rows_and_lse(impl, bias):
    starts = oracles.cu_seqlens([4, 0, 70])
    x = oracles.packed_inputs([4, 0, 70], bias=bias, head_width=16)
    q = torch.randn(3, 5, 2, 16)
    result = readout(q, x.k, x.v, starts, 70, key_bias=x.key_bias, return_rows=True, return_lse=True, impl=impl)
    exact = x.to(torch.float64)
    out, lse, rows = reference.readout(q.double(), exact.k, exact.v, starts, Options(0.25, exact.key_bias))
    for got, expected in zip(result, (out, rows, lse), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    alone = readout(q, x.k, x.v, starts, 70, key_bias=x.key_bias, impl=impl)
    torch.testing.assert_close(alone, result[0])


def test_readout_rows_are_differentiable():
    q, k, v = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 2, 4), (5, 2, 4), (5, 2, 4)))
    starts = oracles.cu_seqlens([2, 3])
    assert torch.autograd.gradcheck(
        lambda q, k, v: readout(q, k, v, starts, 3, return_rows=True, return_lse=True, impl="torch"), (q, k, v)
    )


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
def test_a_query_without_keys_gives_zero_and_minus_infinity_and_no_gradient(impl):
    inputs, where = (
        oracles.packed_inputs([3, 4], [0, 2], bias="shared"),
        (oracles.cu_seqlens([3, 4]), oracles.cu_seqlens([0, 2]), 4, 2),
    )
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.key_bias)]
    out, lse = packed_attention(*leaves[:3], *where, key_bias=leaves[3], return_lse=True, impl=impl)
    assert (out[:3] == 0).all()
    assert (lse[:, :3] == float("-inf")).all()
    assert lse[:, 3:].isfinite().all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert (grads[0][:3] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
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


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("strided", ["transposed", "expanded", "sliced", "every other channel"])
def test_strides_do_not_matter(strided, impl):
    make = {
        "transposed": lambda: torch.randn(2, 30, 16).transpose(0, 1),
        "expanded": lambda: torch.randn(30, 1, 16).expand(30, 2, 16),
        "sliced": lambda: torch.randn(30, 2, 40)[..., 3:19],
        "every other channel": lambda: torch.randn(30, 2, 32)[..., ::2],
    }[strided]
    q, k, v = make(), make(), make()
    where = (oracles.cu_seqlens([10, 20]), oracles.cu_seqlens([10, 20]), 20, 20)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    plain = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    ours, theirs = packed_attention(*leaves, *where, impl=impl), packed_attention(*plain, *where, impl=impl)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), plain), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", FUSED)
def test_same_inputs_give_the_same_bits_forward_and_backward(impl):
    inputs, attend = (
        oracles.packed_inputs([300, 5, 200], bias="per_head"),
        attend_packed([300, 5, 200], [300, 5, 200], impl),
    )
    first = oracles.run_reference(attend, inputs, torch.float32)
    for _ in range(3):
        again = oracles.run_reference(attend, inputs, torch.float32)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_lse_asked_for_or_not_the_output_is_the_same():
    x, where = oracles.packed_inputs([30, 5]), (oracles.cu_seqlens([30, 5]), oracles.cu_seqlens([30, 5]), 30, 30)
    with_lse, _ = packed_attention(x.q, x.k, x.v, *where, return_lse=True)
    torch.testing.assert_close(with_lse, packed_attention(x.q, x.k, x.v, *where))


def test_gradient_of_the_lse_alone_is_the_softmax():
    x, where = oracles.packed_inputs([6], [4]), (oracles.cu_seqlens([6]), oracles.cu_seqlens([4]), 6, 4)
    bias = torch.zeros(4, 2, requires_grad=True)
    _, lse = packed_attention(x.q, x.k, x.v, *where, key_bias=bias, scale=0.5, return_lse=True, impl="torch")
    grad = torch.autograd.grad(lse.sum(), bias)[0]
    softmax = torch.einsum("qhd,khd->qkh", x.q, x.k).mul(0.5).softmax(dim=1)
    torch.testing.assert_close(grad, softmax.sum(0))


def test_a_batch_of_nothing_gives_nothing():
    packing = Packing.from_keep(torch.zeros(0, 5, dtype=torch.bool))
    q = torch.randn(0, 2, 16)
    assert packed_attention(q, q, q, packing.cu_seqlens, packing.cu_seqlens, 0, 0).shape == (0, 2, 16)
