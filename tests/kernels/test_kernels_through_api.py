"""The public functions with impl="triton": the same contracts, through torch.library and autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import (
    Inputs,
    Results,
    assert_meets_specification,
    cu_seqlens,
    keep_mask,
    masked_inputs,
    packed_inputs,
    run_reference,
    specify_masked,
    specify_packed,
)

from maskattn import masked_attention, packed_attention


def run(attend, inputs: Inputs, device: str) -> Results:
    """As the reference is run: through autograd."""
    return run_reference(attend, inputs.to(device), inputs.q.dtype)


@pytest.mark.parametrize("bias", [None, "shared", "per_head"])
def test_packed_attention(bias, device):
    lengths_q, lengths_k = [40, 0, 3], [7, 5, 65]
    inputs = packed_inputs(lengths_q, lengths_k, head_width=16, bias=bias)
    sides = cu_seqlens(lengths_q).to(device), cu_seqlens(lengths_k).to(device), max(lengths_q), max(lengths_k)

    def attend(q, k, v, key_bias, scale):
        return packed_attention(q, k, v, *sides, key_bias=key_bias, scale=scale, return_lse=True, impl="triton")

    specify = specify_packed(cu_seqlens(lengths_q), cu_seqlens(lengths_k))
    assert_meets_specification(run(attend, inputs, device), inputs, specify)


@pytest.mark.parametrize("skip_queries", [True, False])
def test_masked_attention(skip_queries, device):
    keep = keep_mask("random", 2, 50)
    inputs = masked_inputs(2, 50, head_width=16, bias="shared")

    def attend(q, k, v, key_bias, scale):
        return masked_attention(
            q, k, v, keep.to(device), key_bias=key_bias, scale=scale, skip_queries=skip_queries, return_lse=True,
            impl="triton",
        )  # fmt: skip

    assert_meets_specification(run(attend, inputs, device), inputs, specify_masked(keep, skip_queries))


def test_the_output_alone_is_differentiable(device):
    keep = keep_mask("random", 1, 30)
    inputs = replace(masked_inputs(1, 30, head_width=16, grad_lse=False)).to(device)
    q = inputs.q.requires_grad_()
    masked_attention(q, inputs.k, inputs.v, keep.to(device), impl="triton").sum().backward()
    assert q.grad.transpose(1, 2)[~keep.to(device)].eq(0).all()
    assert q.grad.isfinite().all()


def test_an_unsupported_head_width_is_an_error_that_says_so(device):
    q = torch.zeros(1, 1, 5, 20, device=device)
    with pytest.raises(ValueError, match="head width of 16 to 256"):
        masked_attention(q, q, q, torch.ones(1, 5, dtype=torch.bool, device=device), impl="triton")
