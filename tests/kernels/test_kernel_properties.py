"""Whatever the shapes, lengths, masks and options are, the kernels meet the specification."""

from __future__ import annotations

import pytest
import torch
from launch import run_masked, run_packed
from oracles import (
    assert_meets_specification,
    cu_seqlens,
    masked_inputs,
    packed_inputs,
    specify_masked,
    specify_packed,
    with_alibi,
    with_dropout,
    with_extreme_bias,
)

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402 (there may be no hypothesis)

BIASES = st.sampled_from([None, "shared", "per_head", "extreme"])
HEAD_WIDTHS = st.sampled_from([16, 24, 40])
DTYPES = st.sampled_from([torch.float32, torch.float16])
SEEDS = st.integers(-(2**63), 2**63 - 1)
# Derandomized: a failure must not wait for a lucky night.
quick = hypothesis.settings(
    max_examples=6,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def own_bias(bias):
    return "per_head" if bias == "extreme" else bias


def with_options(inputs, alibi, dropout_p, seed):
    inputs = with_alibi(inputs, unplaced=0.2) if alibi else inputs
    return with_dropout(inputs, dropout_p, seed) if dropout_p else inputs


# With low biases, values computed past the end of a sequence overflow; they are discarded.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@quick
@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    head_width=HEAD_WIDTHS,
    dtype=DTYPES,
    bias=BIASES,
    alibi=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.7]),
    seed=SEEDS,
)
def test_packed_sequences(lengths, heads, head_width, dtype, bias, alibi, dropout_p, seed, device):
    lengths_q, lengths_k = [q for q, _ in lengths], [k for _, k in lengths]
    inputs = packed_inputs(lengths_q, lengths_k, heads=heads, head_width=head_width, dtype=dtype, bias=own_bias(bias))
    inputs = with_extreme_bias(inputs) if bias == "extreme" else inputs
    inputs = with_options(inputs, alibi, dropout_p, seed)
    specify = specify_packed(cu_seqlens(lengths_q), cu_seqlens(lengths_k))
    results = run_packed(inputs, lengths_q, lengths_k, device)
    assert_meets_specification(results, inputs, specify, carries=bias != "extreme")


# With low biases, values computed past the end of a sequence overflow; they are discarded.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@quick
@hypothesis.given(
    keep=st.integers(0, 60).flatmap(
        lambda tokens: st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=1, max_size=3)
    ),
    skip_queries=st.booleans(),
    head_width=HEAD_WIDTHS,
    dtype=DTYPES,
    bias=BIASES,
    alibi=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.7]),
    seed=SEEDS,
)
def test_masked_tensors(keep, skip_queries, head_width, dtype, bias, alibi, dropout_p, seed, device):
    keep_BN = torch.tensor(keep, dtype=torch.bool).reshape(len(keep), len(keep[0]))
    inputs = masked_inputs(*keep_BN.shape, heads=1, head_width=head_width, dtype=dtype, bias=own_bias(bias))
    inputs = with_extreme_bias(inputs) if bias == "extreme" else inputs
    inputs = with_options(inputs, alibi, dropout_p, seed)
    results = run_masked(inputs, keep_BN, skip_queries, device)
    assert_meets_specification(results, inputs, specify_masked(keep_BN, skip_queries), carries=bias != "extreme")
