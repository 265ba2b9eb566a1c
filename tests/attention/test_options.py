"""ALiBi, dropout, bias and the log-sum-exp in every combination; and what a readout adds."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import oracles
import pytest
import torch

from maskattn import packed_attention, readout, token_relevance
from maskattn.attention import reference
from maskattn.attention.ops import flat_options
from maskattn.options import Options, maker

COMBINATIONS = [(bias, alibi, dropout) for bias in (None, "per_head") for alibi in (0, 1) for dropout in (0, 1)]
IMPLS = ["torch", *(["cpu"] if importlib.util.find_spec("maskattn._native") else [])]
# The C++ kernels have no dropout and refuse it.
RUNS = [(impl, *options) for impl in IMPLS for options in COMBINATIONS if impl == "torch" or not options[2]]
# Of chunks of longer sequences, whose dropout is by the position in these.
CHUNKS = 2
RUNS_OF_CHUNKS = [*RUNS, ("torch", None, 0, CHUNKS), ("torch", "per_head", 1, CHUNKS)]


def combined(inputs: oracles.Inputs, alibi: int, dropout: int, sequences: int = 0) -> oracles.Inputs:
    inputs = oracles.with_alibi(inputs) if alibi else inputs
    inputs = oracles.with_dropout(inputs) if dropout else inputs
    return oracles.as_chunks(inputs, sequences) if dropout == CHUNKS else inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("impl", "bias", "alibi", "dropout"), RUNS_OF_CHUNKS)
def test_packed_attention_with_every_combination_of_options(impl, bias, alibi, dropout, dtype):
    lengths_q, lengths_k = [5, 0, 70, 3], [9, 4, 33, 0]
    inputs = combined(oracles.packed_inputs(lengths_q, lengths_k, bias=bias, dtype=dtype), alibi, dropout, 4)
    starts = oracles.cu_seqlens(lengths_q), oracles.cu_seqlens(lengths_k)

    def attend(q, k, v, options):
        return torch.ops.maskattn.packed_attention(q, k, v, *starts, 70, 33, *flat_options(options), True, impl)

    results = oracles.run_reference(attend, inputs, dtype)
    oracles.assert_meets_specification(results, inputs.to(dtype), oracles.specify_packed(*starts))


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize(("impl", "bias", "alibi", "dropout"), RUNS)
def test_masked_attention_with_every_combination_of_options(impl, bias, alibi, dropout, skip_queries):
    inputs, keep = combined(oracles.masked_inputs(3, 40, bias=bias), alibi, dropout), oracles.keep_mask("random", 3, 40)

    def attend(q, k, v, options):
        return torch.ops.maskattn.masked_attention(q, k, v, keep, skip_queries, *flat_options(options), True, impl)

    oracles.assert_meets_specification(
        oracles.run_reference(attend, inputs, torch.float32), inputs, oracles.specify_masked(keep, skip_queries)
    )


def test_many_blocks_of_queries_are_as_one():
    lengths = [1500, 7]  # two heads of 1500 × 1500 scores are more than "torch" forms at once
    inputs, starts = combined(oracles.packed_inputs(lengths, bias="shared"), 1, CHUNKS, 2), oracles.cu_seqlens(lengths)

    def attend(q, k, v, options):
        return torch.ops.maskattn.packed_attention(
            q, k, v, starts, starts, 1500, 1500, *flat_options(options), True, "torch"
        )

    oracles.assert_meets_specification(
        oracles.run_reference(attend, inputs, torch.float32), inputs, oracles.specify_packed(starts, starts)
    )


def test_dropout_is_drawn_anew_and_by_torchs_seed():
    x = torch.randn(30, 2, 16)
    call = x, x, x, oracles.cu_seqlens([30]), oracles.cu_seqlens([30]), 30, 30
    torch.manual_seed(0)
    first, second = packed_attention(*call, dropout_p=0.5), packed_attention(*call, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(first, packed_attention(*call, dropout_p=0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("impl", "bias", "alibi", "dropout"), RUNS_OF_CHUNKS)
def test_readout_with_every_combination_of_options(impl, bias, alibi, dropout, queries):
    starts, x = oracles.cu_seqlens([4, 0, 70]), oracles.packed_inputs([4, 0, 70], bias=bias, head_width=16)
    q = torch.randn(3, queries, 2, 16)
    x = combined(x, alibi, dropout, 3)
    positions_q = torch.rand(3, queries, 2) * 30 if alibi else None
    grads = torch.randn(3, queries, 2, 16), torch.randn(3, queries, 2), torch.randn(queries, 2, 74)

    def differentiate(attend, dtype: torch.dtype) -> list[torch.Tensor]:
        own = replace(x, q=q).to(dtype)
        leaves = own.leaves()
        options = replace(
            own.options, coords_q=positions_q, key_bias=leaves.get("key_bias"), slopes=leaves.get("slopes")
        )
        outputs = attend(leaves["q"], leaves["k"], leaves["v"], starts, options)
        loss = sum((o.masked_fill(o.isinf(), 0) * g).sum() for o, g in zip(outputs, grads, strict=True))
        return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]

    def ours(q, k, v, starts, options):
        out, lse, _, rows = torch.ops.maskattn.readout(q, k, v, starts, 70, *flat_options(options), True, True, impl)
        return out, lse, rows

    exact, same = (differentiate(reference.readout, dtype) for dtype in (torch.float64, torch.float32))
    for number, (got, *expected) in enumerate(zip(differentiate(ours, torch.float32), exact, same, strict=True)):
        oracles.assert_within_budget(got, *expected, f"output or gradient {number}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_relevance_meets_the_specification(impl, classes, each, dtype):
    starts, x = (
        oracles.cu_seqlens([4, 0, 70]),
        oracles.with_alibi(oracles.packed_inputs([4, 0, 70], bias="shared", head_width=16, dtype=dtype)),
    )
    q, g = torch.randn(3, 2, 2, 16).to(dtype), torch.randn(classes, 3, 2, 2, 16).to(dtype)
    origins = torch.randn(2, *((74,) if each else ()), 2, 16).to(dtype)
    positions_q = torch.rand(3, 2, 2) * 30

    def specified(to: torch.dtype) -> torch.Tensor:
        own = x.to(to)
        options = Options(0.25, own.key_bias, own.slopes, positions_q, own.coords_k)
        return reference.token_relevance(*(t.to(to) for t in (q, own.k, own.v, g, *origins)), starts, options)

    given = {"key_bias": x.key_bias, "coords": (positions_q, x.coords_k), "slopes": x.slopes, "impl": impl}
    out, lse = readout(q, x.k, x.v, starts, 70, return_lse=True, **given)
    got = token_relevance(q, x.k, x.v, out, lse, g, starts, 70, key_origin=origins[0], value_origin=origins[1], **given)
    oracles.assert_within_budget(got, specified(torch.float64), specified(dtype))


def test_relevance_for_many_classes_is_that_for_each():
    """For so many classes "torch" takes the keys in several blocks."""
    starts, x = oracles.cu_seqlens([700]), oracles.packed_inputs([700], head_width=16)
    q, g = torch.randn(1, 16, 2, 16), torch.randn(300, 1, 16, 2, 16)
    out, lse = readout(q, x.k, x.v, starts, 700, return_lse=True, impl="torch")
    every = token_relevance(q, x.k, x.v, out, lse, g, starts, 700, impl="torch")
    for c in (0, 299):
        alone = token_relevance(q, x.k, x.v, out, lse, g[c : c + 1], starts, 700, impl="torch")
        torch.testing.assert_close(every[c : c + 1], alone)


def test_dropout_named_on_the_cpu_kernels_is_refused_and_otherwise_goes_to_torch():
    x, starts = torch.randn(5, 2, 16), oracles.cu_seqlens([5])
    call = x, x, x, starts, starts, 5, 5
    if "cpu" in IMPLS:
        with pytest.raises(ValueError, match=r"impl='cpu' has no dropout, got dropout_p=0\.5"):
            packed_attention(*call, dropout_p=0.5, impl="cpu")
    torch.manual_seed(0)
    chosen = packed_attention(*call, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(chosen, packed_attention(*call, dropout_p=0.5, impl="torch"))


def test_equal_options_without_tensors_are_made_once():
    make = maker(Options)
    bias = torch.zeros(3)
    first = make(0.5, None, None, None, None, 0.0, None, "tf32x3")
    assert first == Options(0.5, precision="tf32x3")
    assert make(0.5, None, None, None, None, 0.0, None, "tf32x3") is first
    assert make(0.25) != first
    with_bias = make(0.5, bias)
    assert with_bias.key_bias is bias
    assert make(0.5, bias) is not with_bias
