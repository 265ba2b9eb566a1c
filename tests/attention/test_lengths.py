"""Lengths of sequences that do not fit: every implementation says so alike for tensors on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from maskattn import packed_attention, readout, token_relevance

IMPLS = [None, "torch", "reference", *(["cpu"] if importlib.util.find_spec("maskattn._native") else [])]
WRONG = [
    ([0, 7, 5, 12], 12, r"never decrease, got {name}\[2\]=5 after 7"),
    ([0, 5, 9], 12, r"end with the number of rows, 12, got {name}\[2\]=9"),
    ([0, 5, 20], 20, r"end with the number of rows, 12, got {name}\[2\]=20"),
    ([2, 5, 12], 12, r"start at 0, got {name}\[0\]=2"),
    ([0, 5, 12], 6, r"longest sequence of {name}, 7 rows, got 6"),
    ([0], 12, r"end with the number of rows, 12, got {name}\[0\]=0"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize(("starts", "longest", "message"), WRONG)
def test_packed_attention_refuses_lengths_that_do_not_fit(starts, longest, message, width, impl):
    if impl == "cpu" and width == 20:
        pytest.skip("a head width that the C++ kernels do not have")
    x, wrong = torch.randn(12, 2, width), torch.tensor(starts, dtype=torch.int32)
    right = torch.tensor([0, *[12] * (len(starts) - 1)], dtype=torch.int32)
    if len(starts) == 1:
        right = wrong
    with pytest.raises(ValueError, match=message.format(name="cu_seqlens_q")):
        packed_attention(x, x, x, wrong, right, longest, 12, impl=impl)
    if len(starts) > 1:
        with pytest.raises(ValueError, match=message.format(name="cu_seqlens_k")):
            packed_attention(x, x, x, right, wrong, 12, longest, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("starts", "longest", "message"), WRONG)
def test_readout_and_relevance_refuse_lengths_that_do_not_fit(starts, longest, message, impl):
    wrong, B = torch.tensor(starts, dtype=torch.int32), len(starts) - 1
    x, q = torch.randn(12, 2, 16), torch.randn(B, 1, 2, 16)
    with pytest.raises(ValueError, match=message.format(name="cu_seqlens")):
        readout(q, x, x, wrong, longest, impl=impl)
    with pytest.raises(ValueError, match=message.format(name="cu_seqlens")):
        token_relevance(q, x, x, q, q[..., 0], q[None], wrong, longest, impl=impl)


def test_compiled_calls_are_checked_too():
    torch._dynamo.reset()
    x, wrong = torch.randn(12, 2, 16), torch.tensor([0, 5, 9], dtype=torch.int32)
    compiled = torch.compile(lambda x, starts: packed_attention(x, x, x, starts, starts, 12, 12), backend="aot_eager")
    with pytest.raises(ValueError, match="end with the number of rows, 12"):
        compiled(x, wrong)
