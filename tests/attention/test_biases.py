"""Biases as large as floats are: a finite bias is a number like another, only −inf takes a key out."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import oracles
import pytest
import torch

from maskattn import masked_attention, packed_attention, readout, token_relevance
from maskattn.attention import reference
from maskattn.attention.ops import flat_options
from maskattn.options import Options

IMPLS = ["torch", "reference", *(["cpu"] if importlib.util.find_spec("maskattn._native") else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [(impl, dtype) for impl in IMPLS for dtype in DTYPES if impl == "torch" or dtype == torch.float32] + [
    (impl, torch.bfloat16) for impl in IMPLS if impl == "cpu"
]
LENGTHS = [16, 16, 16, 16, 5, 0, 150]
STARTS = oracles.cu_seqlens(LENGTHS)


@pytest.mark.parametrize("bias", ["shared", "per_head"])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("impl", "dtype"), RUNS)
def test_packed_attention_takes_biases_up_to_the_largest_float(impl, dtype, alibi, bias):
    inputs = oracles.with_extreme_bias(oracles.packed_inputs(LENGTHS, bias=bias, dtype=dtype, head_width=16))
    inputs = oracles.with_alibi(inputs) if alibi else inputs

    def attend(q, k, v, options):
        return torch.ops.maskattn.packed_attention(
            q, k, v, STARTS, STARTS, 150, 150, *flat_options(options), True, impl
        )

    results = oracles.run_reference(attend, inputs, dtype)
    oracles.assert_meets_specification(results, inputs.to(dtype), oracles.specify_packed(STARTS, STARTS), carries=False)


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_masked_attention_takes_biases_up_to_the_largest_float(impl, skip_queries):
    keep, inputs = oracles.keep_mask("random", 4, 60), oracles.masked_inputs(4, 60, bias="per_head", head_width=16)
    inputs = replace(
        inputs, key_bias=oracles.with_extreme_bias(replace(inputs, key_bias=inputs.key_bias[:, 0].T)).key_bias
    )
    inputs = replace(inputs, key_bias=inputs.key_bias.T.contiguous())

    def attend(q, k, v, options):
        return torch.ops.maskattn.masked_attention(q, k, v, keep, skip_queries, *flat_options(options), True, impl)

    results = oracles.run_reference(attend, inputs, torch.float32)
    oracles.assert_meets_specification(results, inputs, oracles.specify_masked(keep, skip_queries), carries=False)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("impl", IMPLS)
def test_readout_and_relevance_take_biases_up_to_the_largest_float(impl, queries):
    x = oracles.with_extreme_bias(oracles.packed_inputs(LENGTHS, bias="per_head", head_width=16))
    q, g = torch.randn(7, queries, 2, 16), torch.randn(3, 7, queries, 2, 16)
    grads = torch.randn(7, queries, 2, 16), torch.randn(queries, 2, len(x.k)), torch.randn(7, queries, 2)

    def run(dtype: torch.dtype, ours: bool) -> list[torch.Tensor]:
        own = replace(x, q=q).to(dtype)
        leaves = own.leaves()
        q_, k_, v_, bias = (leaves[name] for name in ("q", "k", "v", "key_bias"))
        options = Options(0.25, bias)
        if ours:
            out, rows, lse = readout(
                q_, k_, v_, STARTS, 150, key_bias=bias, return_rows=True, return_lse=True, impl=impl
            )
            relevance = token_relevance(q_, k_, v_, out, lse, g, STARTS, 150, key_bias=bias, impl=impl)
        else:
            out, lse, rows = reference.readout(q_, k_, v_, STARTS, options)
            relevance = reference.token_relevance(q_, k_, v_, g.to(dtype), None, None, STARTS, options)
        outputs = out, rows, lse
        loss = sum((o.masked_fill(o.isinf(), 0) * w.to(dtype)).sum() for o, w in zip(outputs, grads, strict=True))
        return [*outputs, relevance, *torch.autograd.grad(loss, list(leaves.values()))]

    names = ("out", "rows", "lse", "relevance", "dq", "dk", "dv", "dbias")
    results = run(torch.float32, True), run(torch.float64, False), run(torch.float32, False)
    for name, *each in zip(names, *results, strict=True):
        oracles.assert_within_budget(*each, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("extreme", [torch.finfo(torch.float32).max, torch.finfo(torch.float32).min])
def test_keys_of_one_extreme_bias_have_equal_weights_and_an_lse_of_that_bias(impl, extreme):
    x = torch.randn(8, 1, 16)
    starts = oracles.cu_seqlens([8])
    out, lse = packed_attention(
        x, x, x, starts, starts, 8, 8, key_bias=torch.full((8,), extreme), return_lse=True, impl=impl
    )
    torch.testing.assert_close(out, x.mean(0).expand_as(x))
    assert (lse == extreme).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [100.0, 10_000.0, -1e6])
def test_an_offset_that_all_scores_share_costs_no_digits(impl, offset):
    """Of the scores as float32 has them, output and gradients are as exact as without the offset."""
    q, k, v, grad = (torch.randn(64, 2, 16) for _ in range(4))
    bias = torch.full((64,), offset)
    scores = torch.einsum("ihd,jhd->hij", q, k) / 4 + offset

    def specified(dtype: torch.dtype) -> list[torch.Tensor]:
        score, value = scores.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()
        out = torch.einsum("hij,jhd->ihd", score.softmax(-1), value)
        ds, dv = torch.autograd.grad((out * grad.to(dtype)).sum(), (score, value))
        dq = torch.einsum("hij,jhd->ihd", ds, k.to(dtype)) / 4
        dk = torch.einsum("hij,ihd->jhd", ds, q.to(dtype)) / 4
        return [out, dq, dk, dv, ds.sum((0, 1))]

    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    starts = oracles.cu_seqlens([64])
    out = packed_attention(*leaves[:3], starts, starts, 64, 64, key_bias=bias, impl=impl)
    got = [out, *torch.autograd.grad((out * grad).sum(), leaves)]
    for name, *each in zip(
        ("out", "dq", "dk", "dv", "dbias"), got, specified(torch.float64), specified(torch.float32), strict=True
    ):
        oracles.assert_within_budget(*each, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_a_bias_without_a_softmax_makes_nan_of_the_queries_that_see_it_alone(impl, wrong):
    bias = torch.zeros(12)
    bias[3] = wrong
    leaves = [torch.randn(12, 2, 16).requires_grad_() for _ in range(3)]
    starts = oracles.cu_seqlens([5, 7])
    out, lse = packed_attention(*leaves, starts, starts, 7, 7, key_bias=bias, return_lse=True, impl=impl)
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    for x in (out, lse.T, *grads):
        assert x[:5].isnan().all()
        assert x[5:].isfinite().all()
    dense = [x.detach().transpose(0, 1)[None] for x in leaves]
    seen = torch.ones(1, 12, dtype=torch.bool).index_fill(1, torch.tensor(3), False)
    out = masked_attention(*dense, seen, key_bias=bias[None], impl=impl)
    assert out.isfinite().all()
