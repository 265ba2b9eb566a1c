"""Backward in one pass in the simulator against the specification."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from oracles import (
    EMPTY_SIDES,
    assert_meets_specification,
    cu_seqlens,
    gradients_of_leaves,
    packed_inputs,
    specify_packed,
    with_alibi,
    with_extreme_bias,
)
from simulated_gradients import check, differentiate
from simulated_launch import simulating

import maskattn
from maskattn.kernels.attention import backward as two_passes
from maskattn.kernels.gluon import backward
from maskattn.kernels.gluon.configs import GRADIENT, GradientConfig, choose_gradient
from maskattn.kernels.tables.lookup import padded_width
from maskattn.operands import QKV, Sequences
from maskattn.options import Options
from maskattn.results import OutputGradients, Outputs


@pytest.mark.parametrize(
    ("head_width", "length"), [*((64, x) for x in (1, 63, 64, 65, 127, 128, 129, 257)), (128, 64), (128, 129)]
)
def test_one_sequence_of_lengths_around_whole_blocks(head_width, length):
    inputs = packed_inputs([length], heads=1, head_width=head_width, dtype=torch.bfloat16)
    check(inputs, [length], [length], GRADIENT[head_width])


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [([15, 1, 165], [15, 1, 165]), ([64, 33, 1], [65, 15, 271]), ([5, 0, 33, 0], [0, 7, 64, 0]), *EMPTY_SIDES],
    ids=["unequal", "cross", "some_empty", "no_queries", "no_keys", "empty"],
)
def test_sequences_of_unequal_lengths(lengths_q, lengths_k):
    inputs = packed_inputs(lengths_q, lengths_k, head_width=64, dtype=torch.bfloat16, bias="per_head")
    check(inputs, lengths_q, lengths_k, GRADIENT[64])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_width", [16, 24, 32, 48, 64, 72, 80, 96, 128])
def test_head_widths_and_dtypes(head_width, dtype):
    lengths = [65, 3, 150]
    inputs = packed_inputs(lengths, heads=2, head_width=head_width, dtype=dtype)
    check(inputs, lengths, lengths, GRADIENT[padded_width(head_width)])


@pytest.mark.parametrize("bias", [None, "shared", "per_head"])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("head_width", [64, 128])
def test_every_set_of_options(head_width, alibi, bias):
    lengths_q, lengths_k = [37, 0, 70], [5, 7, 130]
    inputs = packed_inputs(lengths_q, lengths_k, head_width=head_width, dtype=torch.bfloat16, bias=bias)
    check(with_alibi(inputs) if alibi else inputs, lengths_q, lengths_k, GRADIENT[head_width])


@pytest.mark.parametrize("seed", range(8))
def test_random_lengths_options_stages_and_turns(seed):
    draw = random.Random(seed)
    batch = draw.randint(1, 4)
    lengths_q, lengths_k = ([draw.choice([0, 1, draw.randint(1, 300)]) for _ in range(batch)] for _ in range(2))
    head_width = draw.choice([32, 64, 80, 128])
    inputs = packed_inputs(
        lengths_q,
        lengths_k,
        heads=draw.randint(1, 2),
        head_width=head_width,
        dtype=draw.choice([torch.float16, torch.bfloat16]),
        bias=draw.choice([None, "shared", "per_head"]),
        scale=draw.choice([None, 0.3, -0.2]),
        seed=seed,
    )
    config = GradientConfig(
        blocks=1 if head_width > 64 else 2,
        stages=draw.choice([2, 3, 4]),
        in_registers=draw.random() < 0.5,
        masks_all=draw.random() < 0.5,
    )
    check(with_alibi(inputs, seed) if draw.random() < 0.3 else inputs, lengths_q, lengths_k, config, seed)


def test_biases_up_to_the_largest_numbers_and_minus_infinity():
    lengths = [150, 40]
    inputs = with_extreme_bias(packed_inputs(lengths, head_width=64, dtype=torch.bfloat16, bias="shared"))
    results = differentiate(inputs, lengths, lengths, GRADIENT[64])
    assert_meets_specification(results, inputs, specify_packed(cu_seqlens(lengths), cu_seqlens(lengths)), False)


def test_only_dq_depends_on_who_comes_first():
    lengths = [100, 200]
    inputs = packed_inputs(lengths, head_width=64, dtype=torch.bfloat16, bias="shared")
    first, *others = (differentiate(inputs, lengths, lengths, GRADIENT[64], seed) for seed in range(3))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in ("dk", "dv", "dkey_bias"))
        torch.testing.assert_close(first["dq"], other["dq"])


def test_tokens_of_one_sequence_reach_no_other():
    lengths = [70, 90, 33]
    inputs = packed_inputs(lengths, head_width=64, dtype=torch.float16, bias="shared")
    expected = differentiate(inputs, lengths, lengths, GRADIENT[64])
    bad = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "key_bias", "grad_out")}
    for x in bad.values():
        x[70:160] = float("nan")
    results = differentiate(replace(inputs, **bad), lengths, lengths, GRADIENT[64])
    rest = torch.cat([torch.arange(70), torch.arange(160, 193)])
    for name in ("dq", "dk", "dv", "dkey_bias"):
        assert torch.equal(results[name][rest], expected[name][rest]), name


def test_tensors_with_any_strides():
    lengths = [70, 33]
    inputs = packed_inputs(lengths, heads=2, head_width=64, dtype=torch.float16)
    qkv = torch.randn(103, 3, 2, 64).half()
    apart = torch.randn(2, 103, 129).half()[..., 1::2].transpose(0, 1)
    check(replace(inputs, q=qkv[:, 0], k=qkv[:, 1], v=qkv[:, 2]), lengths, lengths, GRADIENT[64])
    check(replace(inputs, q=apart, k=apart, grad_out=apart), lengths, lengths, GRADIENT[64])


def test_rows_of_a_longer_buffer_and_of_sequences_longer_than_announced():
    inputs = packed_inputs([300], heads=1, head_width=64, dtype=torch.float16)
    ends = torch.tensor([0, 20, 260], dtype=torch.int32)
    sequences, qkv = Sequences(ends, ends, 100, 100), QKV(inputs.q, inputs.k, inputs.v)
    outputs = Outputs(inputs.q, torch.zeros(1, 300), torch.zeros(0))
    with simulating():
        grads = backward.packed_backward(
            OutputGradients(inputs.grad_out, None), qkv, outputs, sequences, inputs.options, GRADIENT[64]
        )
    for x in (grads.q, grads.k, grads.v):
        assert x[:20].isfinite().all()
        assert x[20:260].isnan().all()
        assert x[260:].eq(0).all()


@pytest.mark.parametrize(
    ("given", "forbidden", "passes"),
    [({"deterministic": False}, False, 1), ({}, False, 2), ({"deterministic": False}, True, 2)],
    ids=["allowed", "by_default", "forbidden_in_torch"],
)
def test_one_pass_is_taken_only_where_it_is_allowed(given, forbidden, passes, monkeypatch):
    taken = []
    for count, module in ((1, backward), (2, two_passes)):
        whole = module.packed_backward
        monkeypatch.setattr(module, "packed_backward", lambda *x, c=count, f=whole: taken.append(c) or f(*x))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: forbidden)
    lengths = [40, 100]
    inputs = packed_inputs(lengths, heads=2, head_width=64, dtype=torch.bfloat16, bias="per_head")
    ends, leaves = cu_seqlens(lengths), inputs.leaves()
    with simulating():
        out, lse = maskattn.packed_attention(
            leaves["q"], leaves["k"], leaves["v"], ends, ends, 100, 100, key_bias=leaves["key_bias"], return_lse=True,
            impl="gluon", **given,
        )  # fmt: skip
        found = gradients_of_leaves([(out, inputs.grad_out), (lse, inputs.grad_lse)], leaves)
    results = {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": grad for name, grad in found.items()}
    assert_meets_specification(results, inputs, specify_packed(ends, ends))
    assert taken == [passes]


def test_what_does_not_fit_takes_two_passes():
    plain, alibi = Options(1.0), Options(1.0, slopes=torch.ones(2))
    assert [width for width in range(16, 257, 8) if choose_gradient(width, plain)] == list(range(16, 129, 8))
    assert choose_gradient(64, alibi) is None
