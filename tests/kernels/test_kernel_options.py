"""Two-dimensional ALiBi and dropout in the kernels, alone and with every other option, against the specification."""

from __future__ import annotations

import itertools
from dataclasses import replace

import oracles
import pytest
import torch
import triton
import triton.language as tl
from launch import force, run_masked, run_packed
from torch import Tensor

from maskattn.dropout import dropout_factors as specified_factors
from maskattn.dropout import dropout_threshold
from maskattn.kernels.language.dropout import dropout_factors, load_noise
from maskattn.kernels.launch.arguments import dropout_argument
from maskattn.kernels.tables.config import Config
from maskattn.options import Options

SETS_OF_OPTIONS = list(itertools.product([None, "shared", "per_head"], [False, True], [False, True]))


def with_options(inputs: oracles.Inputs, alibi: bool, dropout: bool) -> oracles.Inputs:
    inputs = oracles.with_alibi(inputs) if alibi else inputs
    return oracles.with_dropout(inputs) if dropout else inputs


def check_packed(inputs: oracles.Inputs, lengths_q: list[int], lengths_k: list[int], device: str) -> None:
    specify = oracles.specify_packed(oracles.cu_seqlens(lengths_q), oracles.cu_seqlens(lengths_k))
    oracles.assert_meets_specification(run_packed(inputs, lengths_q, lengths_k, device), inputs, specify)


def check_masked(inputs: oracles.Inputs, keep: Tensor, skip_queries: bool, device: str) -> None:
    oracles.assert_meets_specification(
        run_masked(inputs, keep, skip_queries, device), inputs, oracles.specify_masked(keep, skip_queries)
    )


@pytest.mark.parametrize(("bias", "alibi", "dropout"), SETS_OF_OPTIONS)
def test_every_set_of_options_on_packed_sequences(bias, alibi, dropout, device):
    lengths_q, lengths_k = [37, 0, 3], [5, 7, 70]
    inputs = with_options(oracles.packed_inputs(lengths_q, lengths_k, head_width=16, bias=bias), alibi, dropout)
    check_packed(inputs, lengths_q, lengths_k, device)


@pytest.mark.parametrize(("bias", "alibi"), [(None, False), ("per_head", True)])
@pytest.mark.parametrize("left_out", ["none", "query_offsets", "key_offsets"])
def test_chunks_of_longer_sequences_drop_by_their_positions_in_these(left_out, bias, alibi, device):
    lengths_q, lengths_k = [37, 0, 3, 20, 9], [5, 7, 70, 33, 0]
    inputs = with_options(oracles.packed_inputs(lengths_q, lengths_k, head_width=16, bias=bias), alibi, True)
    inputs = replace(oracles.as_chunks(inputs, 5), **({} if left_out == "none" else {left_out: None}))
    check_packed(inputs, lengths_q, lengths_k, device)


@pytest.mark.parametrize(("bias", "alibi", "dropout"), SETS_OF_OPTIONS)
@pytest.mark.parametrize("skip_queries", [True, False])
def test_every_set_of_options_on_dense_tensors(skip_queries, bias, alibi, dropout, device):
    inputs = with_options(oracles.masked_inputs(2, 70, heads=1, head_width=16, bias=bias), alibi, dropout)
    check_masked(inputs, oracles.keep_mask("random", 2, 70), skip_queries, device)


@pytest.mark.parametrize(
    ("head_width", "dtype"),
    [(48, torch.float16), (64, torch.bfloat16), (80, torch.float32), (80, torch.float16)],
    ids=str,
)
def test_head_widths_and_dtypes(head_width, dtype, device):
    lengths = [65, 3]
    inputs = with_options(
        oracles.packed_inputs(lengths, heads=1, head_width=head_width, dtype=dtype, bias="per_head"), True, True
    )
    check_packed(inputs, lengths, lengths, device)


def test_queries_with_positions_of_their_own(device):
    inputs = with_options(oracles.masked_inputs(2, 50, 20), True, True)
    check_masked(inputs, oracles.keep_mask("blob", 2, 50), False, device)


def test_positions_with_any_strides(device):
    lengths = [40, 30]
    inputs = oracles.with_alibi(oracles.packed_inputs(lengths, heads=1, head_width=16))
    apart = torch.stack([inputs.coords_q, inputs.coords_q + 1], dim=2).flip(0)
    inputs = replace(
        inputs,
        coords_q=apart[:, :, 0].flip(0).T.contiguous().T,
        coords_k=torch.cat([inputs.coords_k, inputs.coords_k], dim=1)[:, 1:3].flip(1),
        slopes=torch.tensor([0.1, 0.3])[::2],
    )
    check_packed(inputs, lengths, lengths, device)


def test_one_position_for_all_tokens(device):
    lengths = [40]
    inputs = oracles.with_alibi(oracles.packed_inputs(lengths, heads=1, head_width=16))
    inputs = replace(inputs, coords_q=inputs.coords_q[:1].expand(40, 2))
    check_packed(inputs, lengths, lengths, device)


def test_tokens_without_a_position_are_at_distance_zero(device):
    inputs = oracles.with_alibi(oracles.packed_inputs([30], heads=1, head_width=16), unplaced=2.0)
    assert inputs.coords_q.isnan().all()
    results, plain = (run_packed(x, [30], [30], device) for x in (inputs, replace(inputs, slopes=None)))
    assert results["dslopes"].eq(0).all()
    torch.testing.assert_close({name: results[name] for name in plain}, plain)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("skip_queries", [True, False])
def test_poisoned_background_never_reaches_an_output_or_a_gradient(skip_queries, poison, device):
    keep = oracles.keep_mask("random", 2, 50)
    clean = with_options(oracles.masked_inputs(2, 50, heads=1, head_width=16, bias="per_head"), True, True)
    background_BHND = ~keep[:, None, :, None].expand_as(clean.k)
    bad = replace(
        clean,
        k=clean.k.masked_fill(background_BHND, poison),
        v=clean.v.masked_fill(background_BHND, poison),
        key_bias=clean.key_bias.masked_fill(~keep[:, None], poison),
        coords_k=clean.coords_k.masked_fill(~keep[..., None], poison),
        coords_q=clean.coords_q.masked_fill(~keep[..., None], poison) if skip_queries else clean.coords_q,
    )
    results, expected = run_masked(bad, keep, skip_queries, device), run_masked(clean, keep, skip_queries, device)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_keys_biased_to_minus_infinity_are_as_if_absent(device):
    lengths = [70, 40]
    inputs = with_options(oracles.packed_inputs(lengths, heads=1, head_width=16, bias="shared"), True, True)
    absent = torch.zeros(110, dtype=torch.bool)
    absent[:50], absent[55:60], absent[70:] = True, True, True
    inputs = replace(inputs, key_bias=inputs.key_bias.masked_fill(absent, float("-inf")))
    check_packed(inputs, lengths, lengths, device)


def test_the_same_result_every_time(device):
    inputs = with_options(
        oracles.packed_inputs([40, 20], head_width=16, dtype=torch.float16, bias="shared"), True, True
    )
    first, second = (run_packed(inputs, [40, 20], [40, 20], device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "config", [Config(16, 16, 4, 1), Config(16, 64, 4, 1, plain_tail=True), Config(128, 32, 4, 1)], ids=str
)
def test_any_tile_size(config, device, monkeypatch):
    force(config, monkeypatch)
    lengths_q, lengths_k = [33, 16], [66, 17]
    inputs = with_options(oracles.packed_inputs(lengths_q, lengths_k, heads=1, head_width=16), True, True)
    check_packed(inputs, lengths_q, lengths_k, device)


def test_a_negative_scale_does_not_change_the_distance_term(device):
    check_packed(oracles.with_alibi(oracles.packed_inputs([40], scale=-0.5)), [40], [40], device)


@triton.jit
def factors_kernel(
    factors_ptr, dropout, first_query, first_key, head, sequence, M: tl.constexpr, N: tl.constexpr,
    TRANSPOSED: tl.constexpr
):  # fmt: skip
    noise = load_noise(dropout, tl.load(head), tl.load(sequence))
    factors = dropout_factors(noise, tl.load(first_query), tl.load(first_key), M, N, TRANSPOSED)
    if TRANSPOSED:
        factors = tl.trans(factors)
    tl.store(factors_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], factors)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 0.5, 0.8, 1 - 1e-12])
@pytest.mark.parametrize("seed", [0, -1, 1234567890123456789, -(2**63)])
def test_the_dropped_weights_are_those_of_the_specification(seed, dropout_p, transposed, device):
    first_query, first_key, head, sequence = 32, 2**31 - 64, 5, 70000
    seeds = torch.tensor([seed], device=device)
    factors = torch.empty(32, 64, device=device)
    scalars = [torch.tensor(x, dtype=torch.int32, device=device) for x in (first_query, first_key, head, sequence)]
    dropout = dropout_argument(Options(1.0, dropout_p=dropout_p, dropout_seed=seeds))
    factors_kernel[(1,)](factors, dropout, *scalars, M=32, N=64, TRANSPOSED=transposed)
    expected = specified_factors(seeds, dropout_p, *positions(first_query, first_key, head, sequence, device))
    assert torch.equal(factors, expected.float())


def positions(first_query: int, first_key: int, head: int, sequence: int, device: str) -> tuple[Tensor, ...]:
    """The positions of the weights of a tile of 32 queries and 64 keys."""
    queries, keys = first_query + torch.arange(32)[:, None], first_key + torch.arange(64)[None, :]
    return tuple(x.to(device) for x in (queries, keys, torch.tensor(head), torch.tensor(sequence)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("query_offset", "key_offset"), [(7, None), (None, 4), (3, 1), (2**20, 2), (0, 2**30 + 3)])
def test_a_chunks_dropped_weights_are_those_of_the_whole_sequence(query_offset, key_offset, transposed, device):
    first_query, first_key, head, sequence = 32, 64, 1, 2
    offsets = (None if x is None else torch.tensor([0, 0, x], dtype=torch.int32) for x in (query_offset, key_offset))
    query_offsets, key_offsets = (None if x is None else x.to(device) for x in offsets)
    seed, factors = torch.tensor([99], device=device), torch.empty(32, 64, device=device)
    scalars = [torch.tensor(x, dtype=torch.int32, device=device) for x in (first_query, first_key, head, sequence)]
    options = Options(1.0, dropout_p=0.5, dropout_seed=seed, query_offsets=query_offsets, key_offsets=key_offsets)
    factors_kernel[(1,)](factors, dropout_argument(options), *scalars, M=32, N=64, TRANSPOSED=transposed)
    first_query, first_key = first_query + (query_offset or 0), first_key + (key_offset or 0)
    expected = specified_factors(seed, 0.5, *positions(first_query, first_key, head, sequence, device))
    assert torch.equal(factors, expected.float())


@pytest.mark.parametrize("dropout_p", [0.0, 1e-10, 0.1, 0.5, 0.75, 1 - 1e-12])
def test_the_threshold_is_that_of_the_specification(dropout_p):
    assert dropout_argument(Options(1.0, dropout_p=dropout_p)).threshold % 2**32 == dropout_threshold(dropout_p)
