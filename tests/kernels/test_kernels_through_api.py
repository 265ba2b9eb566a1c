"""The public functions with impl="triton": the same contracts, through torch.library and autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import (
    Inputs,
    Results,
    assert_meets_specification,
    assert_within_budget,
    cu_seqlens,
    keep_mask,
    masked_inputs,
    packed_inputs,
    run_reference,
    specify_masked,
    specify_packed,
)

from maskattn import masked_attention, packed_attention, readout
from maskattn.attention import reference


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


@pytest.mark.parametrize("bias", [None, (9,), (9, 2)])
def test_packed_op_passes_opcheck(bias, device):
    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    starts = cu_seqlens([4, 5]).to(device)
    key_bias = None if bias is None else leaf(*bias)
    tensors = leaf(9, 2, 16), leaf(9, 2, 16), leaf(9, 2, 16)
    torch.library.opcheck(
        torch.ops.maskattn.packed_attention.default, (*tensors, starts, starts, 5, 5, key_bias, 0.25, True, "triton")
    )


@pytest.mark.parametrize("skip_queries", [True, False])
def test_masked_op_passes_opcheck(skip_queries, device):
    q, k, v = (torch.randn(2, 2, 7, 16, device=device, requires_grad=True) for _ in range(3))
    bias, keep = torch.randn(2, 7, device=device, requires_grad=True), keep_mask("random", 2, 7).to(device)
    torch.library.opcheck(
        torch.ops.maskattn.masked_attention.default, (q, k, v, keep, bias, 0.25, skip_queries, True, "triton")
    )


def test_compiles_whole_and_gives_the_eager_result_and_gradients(device):
    torch._dynamo.reset()
    starts = cu_seqlens([4, 5]).to(device)
    keep = keep_mask("random", 1, 9).to(device)
    x = torch.randn(9, 2, 16, device=device, requires_grad=True)
    bias = torch.randn(9, 2, device=device, requires_grad=True)

    def attend(x, bias):
        packed = packed_attention(x, x, x, starts, starts, 5, 5, key_bias=bias, impl="triton")
        dense = x.transpose(0, 1)[None]
        masked = masked_attention(dense, dense, dense, keep, impl="triton")
        read, rows = readout(x[None, :2], x, x, starts[[0, 2]], 9, return_rows=True, impl="triton")
        return packed.sum() + masked.square().sum() + read.sum() + rows.square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, bias), attend(x, bias))
    for ours, eager in zip(
        torch.autograd.grad(compiled(x, bias), (x, bias)), torch.autograd.grad(attend(x, bias), (x, bias)), strict=True
    ):
        torch.testing.assert_close(ours, eager)


def test_readout_meets_the_specification_with_its_rows(device):
    starts = cu_seqlens([4, 0, 40])
    inputs = packed_inputs([4, 0, 40], head_width=16, bias="per_head")
    q = torch.randn(3, 2, 2, 16)
    got = readout(
        *(x.to(device) for x in (q, inputs.k, inputs.v, starts)),
        40,
        key_bias=inputs.key_bias.to(device),
        return_rows=True,
        return_lse=True,
        impl="triton",
    )
    exact = inputs.to(torch.float64)
    out, lse, rows = reference.readout(q.double(), exact.k, exact.v, starts, key_bias=exact.key_bias)
    single = reference.readout(q, inputs.k, inputs.v, starts, key_bias=inputs.key_bias)
    for name, ours, truth, same in zip(
        ("out", "rows", "lse"), got, (out, rows, lse), (single[0], single[2], single[1]), strict=True
    ):
        assert_within_budget(ours, truth, same, name)
