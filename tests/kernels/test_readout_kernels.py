"""readout_forward and readout_backward against the specification."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
import triton
from launch import WIDTHS_AND_DTYPES
from oracles import LENGTHS, as_chunks, cu_seqlens
from readout_cases import Readout, assert_meets_specification, check, make_readout, pairs_of, run

from maskattn.kernels.launch.support import DTYPES, HEAD_WIDTHS
from maskattn.kernels.readout import call, forward
from maskattn.kernels.readout.forward import readout_forward
from maskattn.kernels.tables.config import ReadoutConfig, Target
from maskattn.kernels.tables.lookup import look_up
from maskattn.options import Options

INTERPRETING = bool(triton.knobs.runtime.interpret)


def force_splits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "number_of_splits", lambda *_: count)


@pytest.mark.parametrize(("length", "queries"), [(n, 1 + i % 2) for i, n in enumerate((0, *LENGTHS))])
def test_one_sequence_of_each_length(length, queries, device, monkeypatch):
    if INTERPRETING and length > 200:
        monkeypatch.setattr(call, "choose", lambda *_: ReadoutConfig(256, 4, 1, 4))
    check(make_readout([length], queries, heads=1, head_width=16, bias="shared", grad_rows=True), device)


@pytest.mark.parametrize(
    ("lengths", "queries"),
    [((15, 1, 65), 1), ((15, 1, 65), 5), ((0, 64, 0, 3), 2), ((111, 63), 16), ((0, 0), 1), ((0, 0), 3)],
    ids=str,
)
def test_sequences_of_unequal_lengths(lengths, queries, device):
    check(make_readout(lengths, queries, head_width=16, bias="per_head"), device)


def test_no_sequences(device):
    results = run(make_readout([], 3, bias="shared", alibi=True), device)
    assert {name: tuple(x.shape) for name, x in results.items()} == {
        **dict.fromkeys(("out", "dq"), (0, 3, 2, 32)),
        **dict.fromkeys(("dk", "dv"), (0, 2, 32)),
        "lse": (0, 3, 2),
        "rows": (3, 2, 0),
        "dkey_bias": (0,),
        "dslopes": (2,),
    }
    assert not results["dslopes"].any()


OPTIONS: dict[str, dict] = {
    "bias": {"bias": "shared"},
    "bias_per_head": {"bias": "per_head"},
    "alibi": {"alibi": True},
    "dropout": {"dropout": True},
    "rows": {"grad_rows": True},
    "negative_scale": {"scale": -0.7},
}


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("pair", pairs_of(OPTIONS), ids="+".join)
def test_options_go_together(pair, queries, device):
    options = OPTIONS[pair[0]] | OPTIONS[pair[1]]
    # With one short sequence the reference may be exact by chance, which makes the budget zero; with eight it is not.
    check(make_readout([66, 41, 66, 9] * 2, queries, heads=2, head_width=16, **options), device)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_option_at_once(dtype, queries, device):
    options = {"bias": "per_head", "alibi": True, "dropout": True, "grad_rows": True, "scale": -0.3}
    check(make_readout([70, 0, 66, 41] * 2, queries, dtype=dtype, **options), device)


@pytest.mark.parametrize("queries", [1, 5])
def test_chunks_of_longer_sequences_drop_by_their_positions_in_these(queries, device, monkeypatch):
    force_splits(2, monkeypatch)
    every = {"bias": "per_head", "alibi": True, "dropout": True, "grad_rows": True}
    readout = make_readout([70, 0, 66, 41] * 2, queries, head_width=16, **every)
    check(replace(readout, inputs=as_chunks(readout.inputs, 8)), device)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize(("head_width", "dtype"), WIDTHS_AND_DTYPES, ids=str)
def test_head_widths_and_dtypes(head_width, dtype, queries, device):
    check(make_readout([65, 3], queries, heads=1, head_width=head_width, dtype=dtype, grad_rows=True), device)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("queries", [1, 2])
def test_any_number_of_splits(count, queries, device, monkeypatch):
    force_splits(count, monkeypatch)
    every = {"bias": "shared", "alibi": True, "dropout": True, "grad_rows": True}
    check(make_readout([200], queries, heads=1, head_width=16, **every), device)


@pytest.mark.parametrize("config", [ReadoutConfig(16, 2, 1, 1), ReadoutConfig(128, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("queries", [1, 2])
def test_any_tile_size(config, queries, device, monkeypatch):
    monkeypatch.setattr(call, "choose", lambda *_: config)
    check(make_readout([131], queries, heads=1, head_width=16, dropout=True, grad_rows=True), device)


def test_more_splits_than_the_second_kernel_sums_at_a_time(device, monkeypatch):
    force_splits(6, monkeypatch)
    monkeypatch.setattr(forward, "BLOCK_SPLITS", 4)
    monkeypatch.setattr(call, "choose", lambda *_: ReadoutConfig(16, 4, 1, 4))
    check(make_readout([90], heads=1, head_width=16), device)


def test_rows_longer_than_one_program_normalises(device, monkeypatch):
    monkeypatch.setattr(forward, "BLOCK_TOKENS", 32)
    check(make_readout([90, 20], heads=1, head_width=16), device)


@pytest.mark.parametrize("count", [1, 2])
def test_attention_rows_are_computed_only_on_request(count, device, monkeypatch):
    force_splits(count, monkeypatch)
    readout = make_readout([70, 3], 2).to(device)
    x = readout.inputs
    with_rows, without = (readout_forward(x.q, x.k, x.v, *readout.sides, x.options, need) for need in (True, False))
    assert without[3].shape == (2, 2, 0)
    assert all(map(torch.allclose, with_rows[:2], without[:2]))


def test_without_a_gradient_of_lse(device):
    check(make_readout([70, 3], 2, grad_rows=True).with_inputs(grad_lse=None), device)
    check(make_readout([70, 3], 2).with_inputs(grad_lse=None), device)


def test_a_bias_and_slopes_of_another_dtype_get_their_gradients_in_it(device):
    readout = make_readout([40, 3], dtype=torch.float16, bias="shared", alibi=True)
    x = readout.inputs
    check(readout.with_inputs(key_bias=x.key_bias.half(), slopes=x.slopes.half()), device)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, one of three tensors interleaved as a qkv projection leaves them."""
    return torch.stack([x, x + 1, x - 1], dim=1)[:, 0]


def with_far_apart_elements(x: torch.Tensor) -> torch.Tensor:
    """The same values, the last dimension outermost."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """The same values, heads outermost in memory."""
    return x.movedim(-2, 0).contiguous().movedim(0, -2)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("relayout", [strided, with_far_apart_elements, heads_first])
def test_any_strides(relayout, queries, device):
    readout = make_readout([70, 9], queries, head_width=16, bias="per_head", alibi=True, grad_rows=True)
    x = readout.inputs
    changed = {name: relayout(getattr(x, name)) for name in ("q", "k", "v", "grad_out", "coords_q", "grad_lse")}
    readout = readout.with_inputs(**changed, key_bias=x.key_bias.T.contiguous().T, coords_k=x.coords_k.T.contiguous().T)
    check(replace(readout, grad_rows=relayout(readout.grad_rows)), device)


def test_expanded_inputs(device):
    readout = make_readout([70, 9], 2, bias="shared", grad_rows=True)
    x = readout.inputs
    readout = readout.with_inputs(
        q=x.q[:1].expand_as(x.q),
        k=x.k[:, :1].expand_as(x.k),
        v=x.v[:1].expand_as(x.v),
        grad_out=torch.tensor(0.5).expand_as(x.grad_out),
        grad_lse=torch.tensor(-2.0).expand_as(x.grad_lse),
        key_bias=torch.tensor(0.3).expand_as(x.key_bias),
    )
    check(replace(readout, grad_rows=torch.tensor(0.7).expand_as(readout.grad_rows)), device)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_a_sequence_without_keys_gives_zero_whatever_gradient_arrives(queries, count, device, monkeypatch):
    force_splits(count, monkeypatch)
    readout = make_readout([0, 5], queries, bias="shared", alibi=True, grad_rows=True)
    readout.inputs.grad_out[0], readout.inputs.grad_lse[0] = float("nan"), float("nan")
    results = run(readout, device)
    assert results["out"][0].eq(0).all()
    assert results["lse"][0].eq(float("-inf")).all()
    assert results["dq"][0].eq(0).all()
    assert all(result.isnan().sum() == 0 for result in results.values())


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_keys_biased_to_minus_infinity_are_as_if_absent(queries, count, device, monkeypatch):
    force_splits(count, monkeypatch)
    readout = make_readout([140, 40], queries, heads=1, head_width=16, bias="shared", grad_rows=True)
    # The complete first tile, some later keys, and every key of the second sequence.
    absent = torch.zeros(180, dtype=torch.bool)
    absent[:70], absent[75:80], absent[140:] = True, True, True
    x = readout.inputs
    readout = readout.with_inputs(key_bias=x.key_bias.masked_fill(absent, float("-inf")))
    # The gradient of a row without keys, or of a weight that is always 0, may well be NaN.
    x.grad_out[1], x.grad_lse[1] = float("nan"), float("nan")
    readout.grad_rows[:, :, absent] = float("nan")
    results = run(readout, device)
    assert results["rows"][:, :, absent].eq(0).all()
    assert all(results[name][absent].eq(0).all() for name in ("dk", "dv", "dkey_bias"))
    results |= {name: results[name][~absent] for name in ("dk", "dv", "dkey_bias")}
    results["rows"] = results["rows"][:, :, ~absent]
    shorter = Readout(
        replace(x, k=x.k[~absent], v=x.v[~absent], key_bias=x.key_bias[~absent]),
        readout.grad_rows[:, :, ~absent],
        (65, 0),
    )
    x.grad_out[1], x.grad_lse[1] = 0, 0
    assert_meets_specification(results, shorter)


@pytest.mark.parametrize("scale", [40.0, -40.0])
@pytest.mark.parametrize("queries", [1, 2])
def test_large_scores_neither_overflow_nor_vanish(scale, queries, device):
    check(make_readout([70], queries, scale=scale), device)


# Values computed past the end overflow; they are discarded.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("offset", [-200, 200])
@pytest.mark.parametrize("queries", [1, 2])
def test_scores_far_from_zero_do_not_leak_from_beyond_the_end_of_a_sequence(offset, queries, device):
    readout = make_readout([5, 70], queries, bias="shared", grad_rows=True)
    check(readout.with_inputs(key_bias=readout.inputs.key_bias + offset), device)


@pytest.mark.parametrize("queries", [1, 2])
def test_the_same_result_every_time(queries, device, monkeypatch):
    force_splits(2, monkeypatch)
    readout = make_readout([90], queries, heads=1, dtype=torch.float16, bias="shared", alibi=True, grad_rows=True)
    first, second = run(readout, device), run(readout, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_max_seqlen_may_be_larger_than_any_sequence(device):
    readout = make_readout([20, 5], heads=1).to(device)
    x, starts = readout.inputs, cu_seqlens([20, 5]).to(device)
    tight, loose = (readout_forward(x.q, x.k, x.v, starts, n, Options(0.1), True) for n in (20, 3000))
    assert all(map(torch.allclose, tight, loose))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", get_args(Target))
def test_every_supported_head_width_has_a_configuration(target, dtype):
    for head_width in HEAD_WIDTHS:
        for pass_ in ("readout", "readout_gradient", "relevance"):
            config = look_up(pass_, target, head_width, dtype)
            assert config.block_n % call.slots(config, head_width, dtype) == 0
            # Dropout draws four words at a time, and matrix products, of several classes too, need at least 16 terms.
            alone = pass_ == "relevance" and call.class_tile(1000, head_width, dtype) == 1
            assert config.block_n % (4 if alone else 16) == 0


def test_splits_fill_the_chip_and_no_more(device):
    config = ReadoutConfig(64, 4, 2, 4)
    processors = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 1
    room = 4 * processors

    def count(longest: int, pairs: int) -> int:
        return call.number_of_splits(config, longest, pairs, torch.device(device))

    assert count(10**6, 1) == room
    assert count(10**6, room) == 1
    assert count(10**6, 100 * room) == 1
    assert count(65, 1) == min(2, room)
    assert count(0, 1) == 1
    assert count(10**6, 0) == room


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_every_head_width_on_a_gpu(head_width, dtype, device):
    every = {"bias": "per_head", "alibi": True, "dropout": True, "grad_rows": True}
    for queries in (1, 2, 16):
        for options in ({}, every):
            check(make_readout([300, 0, 5000, 65], queries, head_width=head_width, dtype=dtype, **options), device)
