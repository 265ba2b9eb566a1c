"""Long dense sequences: the kept rows are moved to the front, attended to, and moved back."""

from __future__ import annotations

import pytest
import torch
from launch import run_masked
from oracles import (
    Inputs,
    Results,
    assert_meets_specification,
    keep_mask,
    masked_inputs,
    specify_masked,
    with_alibi,
    with_dropout,
)
from torch import Tensor


def run_moved(inputs: Inputs, keep: Tensor, skip_queries: bool, device: str) -> Results:
    """As if every sequence were long."""
    return run_masked(inputs, keep, skip_queries, device, moved_from=0)


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("bias", [None, "shared", "per_head"])
@pytest.mark.parametrize("kind", ["random", "blob", "none", "one"])
def test_each_kind_of_mask(kind, bias, skip_queries, device):
    keep, inputs = keep_mask(kind, 3, 70), masked_inputs(3, 70, bias=bias, head_width=16)
    results = run_moved(inputs, keep, skip_queries, device)
    assert_meets_specification(results, inputs, specify_masked(keep, skip_queries))


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_option_at_once(dtype, skip_queries, device):
    keep = keep_mask("random", 2, 90)
    inputs = with_dropout(with_alibi(masked_inputs(2, 90, bias="per_head", dtype=dtype, head_width=40)))
    results = run_moved(inputs, keep, skip_queries, device)
    assert_meets_specification(results, inputs, specify_masked(keep, skip_queries))


def test_queries_of_another_length(device):
    keep, inputs = keep_mask("random", 2, 70), with_alibi(masked_inputs(2, 70, 33, bias="shared"))
    assert_meets_specification(run_moved(inputs, keep, False, device), inputs, specify_masked(keep, False))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_background_never_reaches_an_output_or_a_gradient(poison, device):
    keep, inputs = keep_mask("random", 2, 70), masked_inputs(2, 70, bias="shared", head_width=16)
    clean = run_moved(inputs, keep, True, device)
    for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out):
        x.masked_fill_(~keep[:, None, :, None], poison)
    inputs.key_bias.masked_fill_(~keep, poison)
    inputs.grad_lse.masked_fill_(~keep[:, None, :], poison)
    poisoned = run_moved(inputs, keep, True, device)
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)


@pytest.mark.parametrize("skip_queries", [True, False])
def test_moved_or_in_place_the_result_is_the_same(skip_queries, device):
    keep = keep_mask("random", 2, 90)
    inputs = with_dropout(with_alibi(masked_inputs(2, 90, bias="per_head", head_width=16)))
    moved = run_moved(inputs, keep, skip_queries, device)
    in_place = run_masked(inputs, keep, skip_queries, device)
    assert all(torch.equal(moved[name], in_place[name]) for name in moved)


def test_nothing_to_move(device):
    for shape in ((0, 5), (2, 0)):
        results = run_moved(masked_inputs(*shape), torch.ones(*shape, dtype=torch.bool), True, device)
        assert results["out"].shape[0] == shape[0]
