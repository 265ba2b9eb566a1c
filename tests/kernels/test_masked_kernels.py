"""masked_forward and masked_backward against the specification; kept tokens of dense tensors are read in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from launch import run_masked, run_packed
from oracles import (
    KEEP_KINDS,
    Inputs,
    assert_meets_specification,
    keep_mask,
    masked_inputs,
    specify_masked,
)
from torch import Tensor


def check(inputs: Inputs, keep: Tensor, skip_queries: bool, device: str) -> None:
    results = run_masked(inputs, keep, skip_queries, device)
    assert_meets_specification(results, inputs, specify_masked(keep, skip_queries))


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("kind", KEEP_KINDS)
def test_each_kind_of_mask(kind, skip_queries, device):
    keep = keep_mask(kind, 2, 111)
    check(masked_inputs(2, 111, heads=1, head_width=16, bias="shared"), keep, skip_queries, device)


@pytest.mark.parametrize(
    ("head_width", "dtype", "bias"),
    [
        (48, torch.float16, None),
        (48, torch.float32, "per_head"),
        (64, torch.bfloat16, None),
        (64, torch.float16, "per_head"),
        (80, torch.bfloat16, "shared"),
    ],
    ids=str,
)
def test_head_widths_and_dtypes(head_width, dtype, bias, device):
    keep = keep_mask("random", 2, 100)
    check(masked_inputs(2, 100, head_width=head_width, dtype=dtype, bias=bias), keep, True, device)


@pytest.mark.parametrize("queries", [1, 70])
def test_queries_of_another_length(queries, device):
    keep = keep_mask("blob", 2, 50)
    check(masked_inputs(2, 50, queries, bias="per_head"), keep, False, device)


@pytest.mark.parametrize(("batch", "tokens", "queries"), [(0, 5, 5), (2, 0, 0), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("bias", [None, "shared"])
def test_no_tokens(batch, tokens, queries, bias, device):
    keep = keep_mask("all", batch, tokens)
    check(masked_inputs(batch, tokens, queries, bias=bias), keep, False, device)
    if tokens == queries:
        check(masked_inputs(batch, tokens, bias=bias), keep, True, device)


def test_any_strides(device):
    def tokens_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    inputs = masked_inputs(2, 70, bias="per_head")
    inputs = replace(
        inputs,
        q=tokens_first(inputs.q),
        k=tokens_first(inputs.k),
        v=inputs.v[:, :1].expand_as(inputs.v),
        grad_out=tokens_first(inputs.grad_out),
        grad_lse=torch.tensor(0.1).expand_as(inputs.grad_lse),
        key_bias=inputs.key_bias[:1].expand_as(inputs.key_bias),
    )
    check(inputs, keep_mask("random", 2, 70), True, device)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("skip_queries", [True, False])
def test_poisoned_background_never_reaches_an_output_or_a_gradient(skip_queries, poison, device):
    keep = keep_mask("random", 2, 80)
    clean = masked_inputs(2, 80, bias="per_head")
    background_BHND = ~keep[:, None, :, None].expand_as(clean.k)
    background_BHN = ~keep[:, None, :].expand_as(clean.key_bias)
    bad = replace(
        clean,
        k=clean.k.masked_fill(background_BHND, poison),
        v=clean.v.masked_fill(background_BHND, poison),
        key_bias=clean.key_bias.masked_fill(background_BHN, poison),
    )
    if skip_queries:
        bad = replace(
            bad,
            q=bad.q.masked_fill(background_BHND, poison),
            grad_out=bad.grad_out.masked_fill(background_BHND, poison),
            grad_lse=bad.grad_lse.masked_fill(background_BHN, poison),
        )
    results, expected = run_masked(bad, keep, skip_queries, device), run_masked(clean, keep, skip_queries, device)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_background_positions_and_their_gradients_are_zero(device):
    keep = keep_mask("random", 2, 80)
    results = run_masked(masked_inputs(2, 80, bias="shared"), keep, True, device)
    background = ~keep.to(device)
    for name in ("out", "dq", "dk", "dv"):
        assert results[name].transpose(1, 2)[background].eq(0).all(), name
    assert results["dkey_bias"][background].eq(0).all()
    assert results["lse"].transpose(1, 2)[background].eq(float("-inf")).all()


def test_equal_to_the_packed_kernels_on_the_packed_tokens(device):
    keep = keep_mask("blob", 3, 90)
    dense = masked_inputs(3, 90, dtype=torch.float16, bias="per_head")

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2)[keep]

    sides = replace(
        dense,
        q=packed(dense.q),
        k=packed(dense.k),
        v=packed(dense.v),
        grad_out=packed(dense.grad_out),
        key_bias=packed(dense.key_bias),
        grad_lse=packed(dense.grad_lse).T.contiguous(),
    )
    lengths = keep.sum(1).tolist()
    results, expected = run_masked(dense, keep, True, device), run_packed(sides, lengths, lengths, device)
    keep = keep.to(device)
    for name, want in expected.items():
        got = results[name].transpose(1, 2)[keep]
        assert torch.equal(got.T if name == "lse" else got, want), name


def test_the_same_result_every_time(device):
    inputs, keep = masked_inputs(2, 70, dtype=torch.float16, bias="shared"), keep_mask("random", 2, 70)
    first, second = (run_masked(inputs, keep, False, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_width", [16, 24, 32, 48, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("skip_queries", [True, False])
def test_many_head_widths_on_a_gpu(skip_queries, head_width, dtype, device):
    inputs = masked_inputs(2, 1000, heads=3, head_width=head_width, dtype=dtype, bias="per_head")
    check(inputs, keep_mask("blob", 2, 1000), skip_queries, device)
