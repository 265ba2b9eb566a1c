"""The C++ attention against the specification, on every instruction set of this machine."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from native_attention import as_numpy, run_masked, run_packed
from torch import Tensor

from maskattn import _native, masked_attention, packed_attention, readout

BIASES = [None, "shared", "per_head"]
DTYPES = [torch.float32, torch.bfloat16]
INFINITY = float("inf")


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    return request.param


def check_packed(inputs: oracles.Inputs, lengths_q: list[int], lengths_k: list[int], **how: Any) -> None:
    specify = oracles.specify_packed(oracles.cu_seqlens(lengths_q), oracles.cu_seqlens(lengths_k))
    oracles.assert_meets_specification(run_packed(inputs, lengths_q, lengths_k, **how), inputs, specify)


def check_masked(inputs: oracles.Inputs, keep: Tensor, skip_queries: bool, **how: Any) -> None:
    results = run_masked(inputs, keep, skip_queries, **how)
    oracles.assert_meets_specification(results, inputs, oracles.specify_masked(keep, skip_queries))


def assert_same_bits(a: oracles.Results, b: oracles.Results) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_portable_kernels_are_always_there():
    assert _native.instruction_sets()[-1] == "portable"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", oracles.LENGTHS)
def test_one_sequence_of_each_length(length, dtype, instruction_set):
    inputs = oracles.packed_inputs([length], heads=1, head_width=16, dtype=dtype, bias="shared")
    check_packed(inputs, [length], [length], instruction_set=instruction_set)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_keys_in_the_last_block(dtype, instruction_set):
    lengths = [*range(1, 34), *range(95, 100), *range(126, 131), 191, 192, 193]
    inputs = oracles.packed_inputs(lengths, heads=1, head_width=16, dtype=dtype)
    check_packed(inputs, lengths, lengths, instruction_set=instruction_set)


@pytest.mark.parametrize("head_width", [80, 136])
def test_lse_of_single_tokens_is_as_exact_as_the_reference(head_width, instruction_set):
    # Over many: a single one may be close to the oracle by chance, which would shrink the budget.
    lengths = [1] * 512
    check_packed(
        oracles.packed_inputs(lengths, head_width=head_width), lengths, lengths, instruction_set=instruction_set
    )


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([15, 1, 65], [15, 1, 65]),
        ([64, 33, 1], [65, 15, 71]),
        ([5, 0, 333, 0], [0, 7, 264, 0]),
        *oracles.EMPTY_SIDES,
        ([97, 192], [513, 256]),
    ],
    ids=["unequal", "cross", "some_empty", "no_queries", "no_keys", "empty", "several_chunks"],
)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_of_unequal_lengths(lengths_q, lengths_k, bias, dtype, instruction_set):
    inputs = oracles.packed_inputs(lengths_q, lengths_k, dtype=dtype, bias=bias)
    check_packed(inputs, lengths_q, lengths_k, instruction_set=instruction_set)


def test_no_sequences():
    results = run_packed(oracles.packed_inputs([], bias="shared"), [], [])
    shapes = {name: tuple(x.shape) for name, x in results.items()}
    rows = dict.fromkeys(("out", "dq", "dk", "dv"), (0, 2, 32))
    assert shapes == rows | {"lse": (2, 0), "dkey_bias": (0,)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_width", [16, 24, 40, 48, 64, 80, 128, 136, 256])
def test_head_widths(head_width, dtype, instruction_set):
    lengths = [65, 3, 300]
    inputs = oracles.packed_inputs(lengths, heads=1, head_width=head_width, dtype=dtype, bias="per_head")
    check_packed(inputs, lengths, lengths, instruction_set=instruction_set)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", BIASES)
def test_alibi(bias, dtype, instruction_set):
    lengths_q, lengths_k = [70, 5, 0, 111], [300, 5, 9, 111]
    inputs = oracles.with_alibi(oracles.packed_inputs(lengths_q, lengths_k, bias=bias, dtype=dtype))
    check_packed(inputs, lengths_q, lengths_k, instruction_set=instruction_set)


@pytest.mark.parametrize("bias", [None, "shared"])
def test_without_a_gradient_of_lse(bias):
    check_packed(oracles.packed_inputs([40, 70], bias=bias, grad_lse=False), [40, 70], [40, 70])


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0, 40.0, -40.0])
def test_any_scale(scale, instruction_set):
    inputs = oracles.packed_inputs([70], bias="shared", scale=scale)
    check_packed(inputs, [70], [70], instruction_set=instruction_set)
    check_packed(replace(inputs, key_bias=None), [70], [70], instruction_set=instruction_set)


def strided(x: Tensor) -> Tensor:
    """The same values, one of three tensors interleaved as a qkv projection leaves them."""
    return torch.stack([x, x + 1, x - 1], dim=1)[:, 0]


def heads_first(x: Tensor) -> Tensor:
    """The same values, (H, T, D) in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x: Tensor) -> Tensor:
    """The same values, not aligned to a vector."""
    return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]


@pytest.mark.parametrize("relayout", [strided, heads_first, sliced])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(relayout, dtype):
    lengths = [70, 9]
    inputs = oracles.packed_inputs(lengths, bias="per_head", dtype=dtype)
    moved = replace(inputs, **{name: relayout(getattr(inputs, name)) for name in ("q", "k", "v", "grad_out")})
    moved = replace(moved, key_bias=inputs.key_bias.T.contiguous().T, grad_lse=inputs.grad_lse.T.contiguous().T)
    assert_same_bits(run_packed(inputs, lengths, lengths), run_packed(moved, lengths, lengths))


def test_reversed_rows_and_outputs_with_gaps():
    inputs, where = oracles.packed_inputs([70]), oracles.cu_seqlens([70]).numpy()
    plain = run_packed(inputs, [70], [70])
    q, k, v = (np.ascontiguousarray(as_numpy(x)[::-1])[::-1] for x in (inputs.q, inputs.k, inputs.v))
    wide_out, wide_lse = torch.full((70, 2, 40), 7.0), torch.full((2, 140), 7.0)
    out, lse = wide_out[:, :, 3:35], wide_lse[:, ::2]
    _native.attention_forward(q, k, v, where, where, out.numpy(), lse.numpy(), scale=inputs.scale)
    assert_same_bits({"out": out, "lse": lse}, {name: plain[name] for name in ("out", "lse")})
    assert (wide_out[:, :, :3] == 7).all()
    assert (wide_out[:, :, 35:] == 7).all()
    assert (wide_lse[:, 1::2] == 7).all()


def test_expanded_inputs():
    lengths = [70, 9]
    inputs = oracles.packed_inputs(lengths, bias="shared")
    inputs = replace(
        inputs,
        k=inputs.k[:, :1].expand_as(inputs.k),
        v=inputs.v[:1].expand_as(inputs.v),
        grad_lse=torch.tensor(-2.0).expand_as(inputs.grad_lse),
        key_bias=torch.tensor(0.3).expand_as(inputs.key_bias),
    )
    check_packed(inputs, lengths, lengths)


def test_queries_without_keys_give_zero_whatever_gradient_arrives(instruction_set):
    inputs = oracles.packed_inputs([70, 3], [0, 5], bias="shared")
    inputs.grad_out[:70], inputs.grad_lse[:, :70] = float("nan"), float("nan")
    results = run_packed(inputs, [70, 3], [0, 5], instruction_set=instruction_set)
    assert results["out"][:70].eq(0).all()
    assert results["lse"][:, :70].eq(-INFINITY).all()
    assert results["dq"][:70].eq(0).all()
    assert all(result.isnan().sum() == 0 for result in results.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_biased_to_minus_infinity_are_as_if_absent(dtype, instruction_set):
    lengths = [170, 40]
    inputs = oracles.packed_inputs(lengths, bias="shared", dtype=dtype)
    # The complete first block, some later keys, and every key of the second sequence.
    absent = torch.zeros(210, dtype=torch.bool)
    absent[:70], absent[75:80], absent[170:] = True, True, True
    inputs = replace(inputs, key_bias=inputs.key_bias.masked_fill(absent, -INFINITY))
    # lse is −inf there, and the gradient that arrives at it may well be NaN.
    inputs.grad_lse[:, 170:] = float("nan")
    present = replace(inputs, k=inputs.k[~absent], v=inputs.v[~absent], key_bias=inputs.key_bias[~absent])
    results = run_packed(inputs, lengths, lengths, instruction_set=instruction_set)
    for name in ("dk", "dv", "dkey_bias"):
        assert results[name][absent].eq(0).all()
        results[name] = results[name][~absent]
    shorter = [int((~absent[:170]).sum()), 0]
    oracles.assert_meets_specification(
        results, present, oracles.specify_packed(oracles.cu_seqlens(lengths), oracles.cu_seqlens(shorter))
    )


@pytest.mark.parametrize("offset", [-200, 200])
def test_scores_far_from_zero(offset, instruction_set):
    inputs = oracles.packed_inputs([5, 40], bias="shared")
    inputs = replace(inputs, key_bias=inputs.key_bias + offset)
    check_packed(inputs, [5, 40], [5, 40], instruction_set=instruction_set)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alibi", [False, True])
def test_biases_up_to_the_largest_float(alibi, dtype, instruction_set):
    lengths = [16, 16, 16, 16, 5, 0, 150]
    inputs = oracles.with_extreme_bias(oracles.packed_inputs(lengths, bias="per_head", dtype=dtype))
    inputs = oracles.with_alibi(inputs) if alibi else inputs
    results = run_packed(inputs, lengths, lengths, instruction_set=instruction_set)
    starts = oracles.cu_seqlens(lengths)
    oracles.assert_meets_specification(results, inputs, oracles.specify_packed(starts, starts), carries=False)


def test_the_exponential_is_as_good_as_its_comment_says(instruction_set):
    # Two keys, scores 0 and x: the output's two columns are in the ratio e^x.
    x = torch.linspace(-80, 0, 4001, dtype=torch.float32)
    q, k, v = torch.zeros(4001, 1, 16), torch.zeros(2, 1, 16), torch.zeros(2, 1, 16)
    q[:, 0, 0], k[1, 0, 0], v[0, 0, 0], v[1, 0, 1] = x, 1.0, 1.0, 1.0
    out, lse = torch.empty_like(q), torch.empty(1, 4001)
    starts = oracles.cu_seqlens([4001]).numpy(), oracles.cu_seqlens([2]).numpy()
    arrays = (as_numpy(t) for t in (q, k, v))
    _native.attention_forward(*arrays, *starts, out.numpy(), lse.numpy(), scale=1.0, instruction_set=instruction_set)
    ratio = (out[:, 0, 1] / out[:, 0, 0]).double()
    roundings = 2 * torch.finfo(torch.float32).eps  # of the two outputs and their quotient
    error = (ratio / x.double().exp() - 1).abs()
    assert (error <= 1.7e-7 + 8e-8 * x.abs() + roundings).all()


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", oracles.KEEP_KINDS)
def test_masked_attention(kind, bias, skip_queries, instruction_set):
    inputs, keep = oracles.masked_inputs(3, 165, bias=bias, head_width=24), oracles.keep_mask(kind, 3, 165)
    check_masked(inputs, keep, skip_queries, instruction_set=instruction_set)


@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_attention_with_alibi(dtype, skip_queries, instruction_set):
    inputs = oracles.with_alibi(oracles.masked_inputs(2, 165, bias="shared", dtype=dtype))
    check_masked(inputs, oracles.keep_mask("random", 2, 165), skip_queries, instruction_set=instruction_set)


def test_masked_attention_of_fewer_queries_than_keys():
    check_masked(
        oracles.with_alibi(oracles.masked_inputs(2, 111, 7, bias="per_head")), oracles.keep_mask("blob", 2, 111), False
    )


@pytest.mark.parametrize("poison", [float("nan"), INFINITY])
@pytest.mark.parametrize("skip_queries", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_background_never_reaches_an_output_or_a_gradient(dtype, skip_queries, poison, instruction_set):
    keep = oracles.keep_mask("random", 3, 165)
    keep[1] = False
    clean = oracles.with_alibi(oracles.masked_inputs(3, 165, bias="shared", dtype=dtype))
    background = ~keep[:, None, :, None]
    names = ("q", "k", "v", "grad_out") if skip_queries else ("k", "v")
    dirty = replace(clean, **{name: getattr(clean, name).masked_fill(background, poison) for name in names})
    dirty = replace(dirty, key_bias=clean.key_bias.masked_fill(~keep, poison))
    if skip_queries:
        dirty = replace(dirty, grad_lse=clean.grad_lse.masked_fill(~keep[:, None], poison))
    results = run_masked(dirty, keep, skip_queries, instruction_set=instruction_set)
    assert_same_bits(run_masked(clean, keep, skip_queries, instruction_set=instruction_set), results)
    for name in ("out", "dq", "dk", "dv") if skip_queries else ("dk", "dv"):
        assert results[name][background.expand_as(results[name])].eq(0).all(), name
    assert results["dkey_bias"][~keep].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_and_packed_attention_agree(dtype, instruction_set):
    keep, dense = oracles.keep_mask("random", 1, 300), oracles.masked_inputs(1, 300, dtype=dtype)
    kept = {name: getattr(dense, name)[0].transpose(0, 1)[keep[0]] for name in ("q", "k", "v", "grad_out")}
    packed = replace(dense, **kept, grad_lse=dense.grad_lse[0][:, keep[0]])
    lengths = [int(keep.sum())]
    masked = run_masked(dense, keep, True, instruction_set=instruction_set)
    of_packed = run_packed(packed, lengths, lengths, instruction_set=instruction_set)
    lse = masked.pop("lse")[0][:, keep[0]]
    masked = {name: x[0].transpose(0, 1)[keep[0]] for name, x in masked.items()} | {"lse": lse}
    assert_same_bits({name: masked[name] for name in of_packed}, of_packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype, instruction_set):
    # Long sequences are cut into more pieces for more threads; each short one goes to a single thread.
    lengths = [1100, 1, 65, 0, 300, *[17] * 20]
    inputs = oracles.with_alibi(oracles.packed_inputs(lengths, heads=1, bias="shared", dtype=dtype))
    one = run_packed(inputs, lengths, lengths, threads=1, instruction_set=instruction_set)
    for threads in (0, 2, 5, 16):
        for _ in range(3):
            assert_same_bits(
                one, run_packed(inputs, lengths, lengths, threads=threads, instruction_set=instruction_set)
            )


def test_several_python_threads_at_once():
    lengths = [300, 65]
    inputs = oracles.packed_inputs(lengths, bias="shared")
    alone = run_packed(inputs, lengths, lengths, threads=1)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: run_packed(inputs, lengths, lengths, threads=3), range(40)):
            assert_same_bits(alone, results)


def _attend_in_child(connection: Any, inputs: oracles.Inputs) -> None:
    results = run_packed(inputs, [300, 65], [300, 65], threads=2)
    connection.send({name: x.numpy() for name, x in results.items()})


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that is the point
def test_a_forked_child_starts_threads_of_its_own():
    inputs = oracles.packed_inputs([300, 65])
    parent = run_packed(inputs, [300, 65], [300, 65], threads=2)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    child = fork.Process(target=_attend_in_child, args=(theirs, inputs))
    child.start()
    assert ours.poll(60), "the child hangs"
    assert_same_bits(parent, {name: torch.from_numpy(x) for name, x in ours.recv().items()})
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_and_results_can_be_resized_afterwards(dtype: torch.dtype) -> None:
    q, k, v, x = (torch.randn(9, 2, 16).to(dtype).requires_grad_() for _ in range(4))
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    keep = torch.tensor([[True, False, True]])
    dense = torch.randn(1, 2, 3, 16).to(dtype)
    packed = packed_attention(q, k, v, starts, starts, 5, 5, return_lse=True, impl="cpu")
    gradients = torch.autograd.grad(packed[0].sum(), (q, k, v))
    rows = readout(x[:2, None].detach().clone(), k.detach(), v.detach(), starts, 5, return_rows=True, impl="cpu")
    with torch.no_grad():
        masked = masked_attention(dense, dense, dense, keep, impl="cpu")
        for tensor in (*packed, *gradients, *rows, masked, q, dense, starts, keep):
            tensor.detach().resize_(2 * tensor.numel())
