"""packed_forward and packed_backward against the specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from launch import WIDTHS_AND_DTYPES, force, run_packed
from oracles import EMPTY_SIDES, LENGTHS, Inputs, assert_meets_specification, cu_seqlens, packed_inputs, specify_packed
from torch import Tensor

from maskattn.kernels.attention import forward
from maskattn.kernels.launch.support import HEAD_WIDTHS
from maskattn.kernels.tables.config import Config
from maskattn.operands import Sequences
from maskattn.options import Options


def check(inputs: Inputs, lengths_q: list[int], lengths_k: list[int], device: str) -> None:
    specify = specify_packed(cu_seqlens(lengths_q), cu_seqlens(lengths_k))
    assert_meets_specification(run_packed(inputs, lengths_q, lengths_k, device), inputs, specify)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_sequence_of_each_length(length, device, monkeypatch):
    if triton.knobs.runtime.interpret and length > 200:
        force(Config(128, 128, 4, 1), monkeypatch)
    check(packed_inputs([length], heads=1, head_width=16, bias="shared"), [length], [length], device)


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([15, 1, 65], [15, 1, 65]),
        ([64, 33, 1], [65, 15, 71]),
        ([5, 0, 33, 0], [0, 7, 64, 0]),
        *EMPTY_SIDES,
    ],
    ids=["unequal", "cross", "some_empty", "no_queries", "no_keys", "empty"],
)
@pytest.mark.parametrize("bias", [None, "shared", "per_head"])
def test_sequences_of_unequal_lengths(lengths_q, lengths_k, bias, device):
    check(packed_inputs(lengths_q, lengths_k, bias=bias), lengths_q, lengths_k, device)


def test_no_sequences(device):
    results = run_packed(packed_inputs([], bias="shared"), [], [], device)
    assert {name: tuple(x.shape) for name, x in results.items()} == {
        **dict.fromkeys(("out", "dq", "dk", "dv"), (0, 2, 32)),
        "lse": (2, 0),
        "dkey_bias": (0,),
    }


@pytest.mark.parametrize(("head_width", "dtype"), WIDTHS_AND_DTYPES, ids=str)
def test_head_widths_and_dtypes(head_width, dtype, device):
    lengths = [65, 3]
    inputs = packed_inputs(lengths, heads=1, head_width=head_width, dtype=dtype, bias="per_head")
    check(inputs, lengths, lengths, device)


@pytest.mark.parametrize("bias", [None, "shared"])
def test_without_a_gradient_of_lse(bias, device):
    lengths = [40, 70]
    check(packed_inputs(lengths, bias=bias, grad_lse=False), lengths, lengths, device)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(scale, device):
    lengths = [70]
    check(packed_inputs(lengths, bias="shared", scale=scale), lengths, lengths, device)
    check(packed_inputs(lengths, scale=scale), lengths, lengths, device)


def test_a_bias_of_another_dtype_gets_its_gradient_in_it(device):
    inputs = packed_inputs([40, 3], dtype=torch.float16, bias="shared")
    inputs = replace(inputs, key_bias=inputs.key_bias.half())
    check(inputs, [40, 3], [40, 3], device)


def strided(x: Tensor) -> Tensor:
    """The same values, one of three tensors interleaved as a qkv projection leaves them."""
    return torch.stack([x, x + 1, x - 1], dim=1)[:, 0]


def with_far_apart_elements(x: Tensor) -> Tensor:
    """The same values, head width outermost."""
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def heads_first(x: Tensor) -> Tensor:
    """The same values, (H, T, D) in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("relayout", [strided, with_far_apart_elements, heads_first])
def test_any_strides(relayout, device):
    lengths = [70, 9]
    inputs = packed_inputs(lengths, bias="per_head")
    inputs = replace(inputs, q=relayout(inputs.q), k=relayout(inputs.k), v=relayout(inputs.v))
    inputs = replace(inputs, grad_out=relayout(inputs.grad_out), key_bias=inputs.key_bias.T.contiguous().T)
    check(inputs, lengths, lengths, device)


def test_expanded_inputs(device):
    lengths = [70, 9]
    inputs = packed_inputs(lengths, bias="shared")
    inputs = replace(
        inputs,
        k=inputs.k[:, :1].expand_as(inputs.k),
        v=inputs.v[:1].expand_as(inputs.v),
        grad_out=torch.tensor(0.5).expand_as(inputs.grad_out),
        grad_lse=torch.tensor(-2.0).expand_as(inputs.grad_lse),
        key_bias=torch.tensor(0.3).expand_as(inputs.key_bias),
    )
    check(inputs, lengths, lengths, device)


def test_queries_without_keys_give_zero_and_an_lse_of_minus_infinity(device):
    inputs = packed_inputs([70, 3], [0, 5], bias="shared")
    results = run_packed(inputs, [70, 3], [0, 5], device)
    assert results["out"][:70].eq(0).all()
    assert results["lse"][:, :70].eq(float("-inf")).all()
    assert results["dq"][:70].eq(0).all()
    assert all(result.isnan().sum() == 0 for result in results.values())


def test_a_nan_gradient_at_a_query_without_keys_does_not_spread(device):
    inputs = packed_inputs([70, 3], [0, 5], bias="shared")
    inputs.grad_out[:70], inputs.grad_lse[:, :70] = float("nan"), float("nan")
    results = run_packed(inputs, [70, 3], [0, 5], device)
    assert all(result.isnan().sum() == 0 for result in results.values())


def test_keys_biased_to_minus_infinity_are_as_if_absent(device):
    lengths = [70, 40]
    inputs = packed_inputs(lengths, bias="shared")
    # The complete first tile, some later keys, and every key of the second sequence.
    absent = torch.zeros(110, dtype=torch.bool)
    absent[:50], absent[55:60], absent[70:] = True, True, True
    inputs = replace(inputs, key_bias=inputs.key_bias.masked_fill(absent, float("-inf")))
    # lse is −inf there, and the gradient that arrives at it may well be NaN.
    inputs.grad_lse[:, 70:] = float("nan")
    present = replace(inputs, k=inputs.k[~absent], v=inputs.v[~absent], key_bias=inputs.key_bias[~absent])
    results = run_packed(inputs, lengths, lengths, device)
    shorter = [int((~absent[:70]).sum()), 0]
    results |= {name: results[name][~absent] for name in ("dk", "dv", "dkey_bias")}
    assert_meets_specification(results, present, specify_packed(cu_seqlens(lengths), cu_seqlens(shorter)))


@pytest.mark.parametrize("scale", [40.0, -40.0])
def test_large_scores_neither_overflow_nor_vanish(scale, device):
    lengths = [70]
    check(packed_inputs(lengths, scale=scale), lengths, lengths, device)


# Values computed past the end overflow; they are discarded.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("offset", [-200, 200])
def test_scores_far_from_zero_do_not_leak_from_beyond_the_end_of_a_sequence(offset, device):
    # Past the end q, k, dO and the bias count as 0, so that some 2^(score − lse) is infinite there.
    inputs = packed_inputs([5, 40], bias="shared")
    inputs = replace(inputs, key_bias=inputs.key_bias + offset)
    check(inputs, [5, 40], [5, 40], device)


def test_the_same_result_every_time(device):
    inputs = packed_inputs([70, 30], dtype=torch.float16, bias="shared")
    first, second = (run_packed(inputs, [70, 30], [70, 30], device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("config", [Config(16, 16, 4, 1), Config(16, 64, 4, 1), Config(128, 32, 4, 1)])
def test_any_tile_size(config, device, monkeypatch):
    force(config, monkeypatch)
    lengths_q, lengths_k = [33, 16], [66, 17]
    check(packed_inputs(lengths_q, lengths_k, heads=1, head_width=16, bias="shared"), lengths_q, lengths_k, device)


def test_max_seqlen_may_be_larger_than_any_sequence(device):
    inputs = packed_inputs([20, 5]).to(device)
    starts = cu_seqlens([20, 5]).to(device)
    tight, loose = (
        forward.packed_forward(inputs.q, inputs.k, inputs.v, Sequences(starts, starts, n, n), Options(0.1))
        for n in (20, 500)
    )
    assert all(map(torch.equal, tight, loose))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_every_head_width_on_a_gpu(head_width, dtype, device):
    lengths_q, lengths_k = [300, 0, 1000, 65], [1, 64, 777, 300]
    for bias in (None, "per_head"):
        inputs = packed_inputs(lengths_q, lengths_k, heads=3, head_width=head_width, dtype=dtype, bias=bias)
        check(inputs, lengths_q, lengths_k, device)
