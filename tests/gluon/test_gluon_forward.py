"""The Hopper kernel in the simulator against the specification."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from oracles import (
    EMPTY_SIDES,
    LENGTHS,
    assert_meets_specification,
    cu_seqlens,
    gradients_of_leaves,
    packed_inputs,
    specify_packed,
    with_alibi,
    with_extreme_bias,
)
from simulated_attention import check, force, run
from simulated_launch import simulating

import maskattn
from maskattn.kernels.gluon import forward
from maskattn.operands import Sequences

SETS_OF_OPTIONS = list(itertools.product([None, "shared", "per_head"], [False, True]))


@pytest.mark.parametrize("length", LENGTHS)
def test_one_sequence_of_each_length(length):
    check(packed_inputs([length], heads=1, head_width=64, dtype=torch.bfloat16), [length], [length])


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("head_width", [64, 128])
def test_lengths_around_whole_blocks(head_width, length):
    inputs = packed_inputs([65], [length], heads=1, head_width=head_width, dtype=torch.float16)
    check(inputs, [65], [length])


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([15, 1, 165], [15, 1, 165]),
        ([64, 33, 1], [65, 15, 271]),
        ([5, 0, 33, 0], [0, 7, 64, 0]),
        *EMPTY_SIDES,
    ],
    ids=["unequal", "cross", "some_empty", "no_queries", "no_keys", "empty"],
)
@pytest.mark.parametrize(("bias", "alibi"), [(None, False), ("per_head", True)])
def test_sequences_of_unequal_lengths(lengths_q, lengths_k, bias, alibi):
    inputs = packed_inputs(lengths_q, lengths_k, head_width=64, dtype=torch.bfloat16, bias=bias)
    check(with_alibi(inputs) if alibi else inputs, lengths_q, lengths_k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_width", [16, 24, 32, 48, 64, 72, 80, 96, 128, 136, 192, 256])
def test_head_widths_and_dtypes(head_width, dtype):
    lengths = [65, 3, 150]
    check(packed_inputs(lengths, heads=2, head_width=head_width, dtype=dtype), lengths, lengths)


@pytest.mark.parametrize(("bias", "alibi"), SETS_OF_OPTIONS)
@pytest.mark.parametrize("head_width", [64, 128])
def test_every_set_of_options(head_width, bias, alibi):
    lengths_q, lengths_k = [37, 0, 130], [5, 7, 300]
    inputs = packed_inputs(lengths_q, lengths_k, head_width=head_width, dtype=torch.bfloat16, bias=bias)
    check(with_alibi(inputs) if alibi else inputs, lengths_q, lengths_k)


@pytest.mark.parametrize("seed", range(24))
def test_random_lengths_options_blocks_and_turns(seed, monkeypatch):
    draw = random.Random(seed)
    batch = draw.randint(1, 4)
    lengths_q, lengths_k = ([draw.choice([0, 1, draw.randint(1, 400)]) for _ in range(batch)] for _ in range(2))
    inputs = packed_inputs(
        lengths_q,
        lengths_k,
        heads=draw.randint(1, 3),
        head_width=draw.choice([32, 64, 80, 128]),
        dtype=draw.choice([torch.float16, torch.bfloat16]),
        bias=draw.choice([None, "shared", "per_head"]),
        scale=draw.choice([None, 0.3, -0.2]),
        seed=seed,
    )
    force(monkeypatch, draw.choice([32, 64, 128]), draw.choice([2, 3, 4]), draw.choice([1, 2]))
    check(with_alibi(inputs, seed) if draw.random() < 0.5 else inputs, lengths_q, lengths_k, seed)


@pytest.mark.parametrize("kind", ["shared", "per_head"])
def test_biases_up_to_the_largest_numbers_and_minus_infinity(kind):
    lengths = [150, 40]
    inputs = packed_inputs(lengths, head_width=64, dtype=torch.bfloat16, bias=kind)
    check(with_extreme_bias(inputs), lengths, lengths)


def test_what_turns_come_first_changes_no_bit():
    inputs = with_alibi(packed_inputs([200, 70], head_width=64, dtype=torch.float16, bias="shared"))
    first, *others = (run(inputs, [200, 70], [200, 70], seed) for seed in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_tokens_of_one_sequence_reach_no_other():
    lengths = [70, 90, 33]
    inputs = packed_inputs(lengths, head_width=64, dtype=torch.float16, bias="shared")
    expected = run(inputs, lengths, lengths)
    bad = {name: getattr(inputs, name).clone() for name in ("q", "k", "v", "key_bias")}
    for x in bad.values():
        x[70:160] = float("nan")
    results = run(replace(inputs, **bad), lengths, lengths)
    rest = torch.cat([torch.arange(70), torch.arange(160, 193)])
    assert torch.equal(results[0][rest], expected[0][rest])
    assert torch.equal(results[1][:, rest], expected[1][:, rest])
    assert results[0][70:160].isnan().all()


def test_tensors_with_any_strides():
    lengths = [70, 33]
    inputs = packed_inputs(lengths, heads=2, head_width=64, dtype=torch.float16)
    qkv = torch.randn(103, 3, 2, 64).half()
    apart = torch.randn(2, 103, 129).half()[..., 1::2]
    check(replace(inputs, q=qkv[:, 0], k=qkv[:, 1], v=qkv[:, 2]), lengths, lengths)
    check(replace(inputs, q=apart.transpose(0, 1), k=apart.transpose(0, 1), v=qkv[:, 2]), lengths, lengths)
    check(replace(inputs, k=inputs.k[:, :1].expand(-1, 2, -1)), lengths, lengths)


def test_rows_of_a_longer_buffer_and_of_sequences_longer_than_announced():
    inputs = packed_inputs([300], heads=1, head_width=64, dtype=torch.float16, bias="shared")
    ends = torch.tensor([0, 20, 260], dtype=torch.int32)
    with simulating():
        out, lse, rest = forward.packed_forward(
            inputs.q, inputs.k, inputs.v, Sequences(ends, ends, 100, 100), inputs.options
        )
    assert out[:20].isfinite().all()
    assert out[20:260].isnan().all()
    assert out[260:].eq(0).all()
    assert lse[:, 260:].eq(float("-inf")).all()
    assert rest[:, 260:].eq(0).all()


def test_no_sequences():
    out, lse, rest = run(packed_inputs([], head_width=64, dtype=torch.float16, bias="shared"), [], [])
    assert (tuple(out.shape), tuple(lse.shape), tuple(rest.shape)) == ((0, 2, 64), (2, 0), (2, 0))


def test_gradients_are_those_of_the_triton_kernels_through_the_same_saved_tensors():
    lengths = [40, 100]
    inputs = with_alibi(packed_inputs(lengths, heads=2, head_width=64, dtype=torch.bfloat16, bias="per_head"))
    ends, leaves = cu_seqlens(lengths), inputs.leaves()
    with simulating():
        out, lse = maskattn.packed_attention(
            leaves["q"], leaves["k"], leaves["v"], ends, ends, 100, 100, key_bias=leaves["key_bias"],
            coords=inputs.coords_q, slopes=leaves["slopes"], return_lse=True, impl="gluon",
        )  # fmt: skip
        found = gradients_of_leaves([(out, inputs.grad_out), (lse, inputs.grad_lse)], leaves)
    results = {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": grad for name, grad in found.items()}
    assert_meets_specification(results, inputs, specify_packed(ends, ends))
