"""Tiles read by descriptors: the same results, used only where tensors allow it, and triton's state is restored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from launch import force, run_masked, run_packed
from oracles import (
    assert_meets_specification,
    cu_seqlens,
    keep_mask,
    masked_inputs,
    packed_inputs,
    specify_packed,
    with_alibi,
    with_dropout,
)

from maskattn.kernels.attention import forward
from maskattn.kernels.attention.key_gradient import key_gradient_kernel
from maskattn.kernels.attention.query_gradient import query_gradient_kernel
from maskattn.kernels.launch import descriptors, prepared
from maskattn.kernels.launch.descriptors import describable
from maskattn.kernels.launch.rows import kept_rows, packed_rows, whole_rows
from maskattn.kernels.tables.config import Config

DESCRIBED = Config(64, 32, 4, 1, split=True, descriptors=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch used descriptors; the results cannot tell, as they equal those of pointers bit for bit."""
    if not triton.knobs.runtime.interpret and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no copy engine")
    seen: list[bool] = []

    def launch(kernel, programs, described, *arguments, **constants):
        if kernel in (forward.forward_kernel, query_gradient_kernel, key_gradient_kernel):
            seen.append(described)
        return descriptors.launch(kernel, programs, described, *arguments, **constants)

    monkeypatch.setattr(prepared, "launch", launch)
    return seen


@pytest.mark.parametrize(
    ("head_width", "dtype"),
    [(16, torch.float32), (64, torch.float16), (80, torch.float16), (80, torch.bfloat16), (24, torch.float16)],
    ids=str,
)
def test_descriptors_meet_the_specification(head_width, dtype, launches, device, monkeypatch):
    force(DESCRIBED, monkeypatch)
    lengths_q, lengths_k = [65, 0, 3], [5, 7, 40]
    inputs = packed_inputs(lengths_q, lengths_k, heads=2, head_width=head_width, dtype=dtype, bias="per_head")
    inputs = with_dropout(with_alibi(inputs))
    results = run_packed(inputs, lengths_q, lengths_k, device)
    assert launches == [True] * 3
    assert_meets_specification(results, inputs, specify_packed(cu_seqlens(lengths_q), cu_seqlens(lengths_k)))


def test_the_same_result_as_without_descriptors(launches, device, monkeypatch):
    inputs = packed_inputs([70, 33], heads=1, head_width=48, dtype=torch.float16)
    force(DESCRIBED, monkeypatch)
    described = run_packed(inputs, [70, 33], [70, 33], device)
    force(replace(DESCRIBED, descriptors=False), monkeypatch)
    pointed = run_packed(inputs, [70, 33], [70, 33], device)
    assert launches == [True] * 3 + [False] * 3
    assert all(torch.equal(described[name], pointed[name]) for name in described)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_lies_beyond_a_sequence_is_not_read(launches, device, monkeypatch):
    force(DESCRIBED, monkeypatch)
    inputs = packed_inputs([20, 30], heads=1, head_width=16)
    alone = replace(
        inputs, **{n: getattr(inputs, n)[:20] for n in ("q", "k", "v", "grad_out")}, grad_lse=inputs.grad_lse[:, :20]
    )
    for name in ("q", "k", "v", "grad_out"):
        getattr(inputs, name)[20:] = float("nan")
    results, expected = run_packed(inputs, [20, 30], [20, 30], device), run_packed(alone, [20], [20], device)
    assert all(launches)
    assert all(torch.equal((x[:, :20] if name == "lse" else x[:20]), expected[name]) for name, x in results.items())


def test_gathered_rows_are_read_by_pointers(launches, device, monkeypatch):
    force(DESCRIBED, monkeypatch)
    run_masked(masked_inputs(1, 40, head_width=16), keep_mask("random", 1, 40), True, device)
    assert launches == [False] * 3


@pytest.mark.parametrize(
    ("x", "possible"),
    [
        (torch.zeros(10, 2, 16), True),
        (torch.zeros(10, 3, 2, 16)[:, 1], True),
        (torch.zeros(2, 10, 16).transpose(0, 1), True),
        (torch.zeros(10 * 32 + 1)[1:].view(10, 2, 16), False),
        (torch.zeros(10, 2, 17)[..., :16], False),
        (torch.zeros(1, 2, 16).expand(10, 2, 16), False),
    ],
    ids=["contiguous", "one_of_three", "heads_first", "not_aligned", "odd_rows", "expanded"],
)
def test_which_tensors_a_descriptor_covers(x, possible):
    assert describable(x, packed_rows(cu_seqlens([10]), 10)) == possible


def test_which_rows_a_descriptor_covers():
    x = torch.zeros(2, 3, 10, 16)
    assert describable(x, whole_rows(2, 10, x.device))
    assert not describable(x, kept_rows(torch.ones(2, 10, dtype=torch.bool)))


def test_the_users_allocator_is_left_in_place(device, monkeypatch):
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda: seen.append(_allocation._allocator.get()(100, 128, None))

    descriptors.launch(Kernel(), 1, True, torch.zeros(1, device=device))
    assert seen[0].numel() == 100
    assert seen[0].device.type == device
    assert _allocation._allocator.get() is before
