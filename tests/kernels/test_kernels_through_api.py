"""The public functions with impl="triton" fulfil the same contracts, through torch.library and autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch

from maskattn import masked_attention, packed_attention, readout
from maskattn.attention.ops import flat_options
from maskattn.options import Options


def asked(options: Options) -> dict[str, Any]:
    """The options as the public functions take them."""
    positions = (
        {} if options.slopes is None else {"coords": (options.coords_q, options.coords_k), "slopes": options.slopes}
    )
    return {"scale": options.scale, "key_bias": options.key_bias, **positions}


def run(attend, inputs: oracles.Inputs, device: str) -> oracles.Results:
    """Run through autograd, as the reference is."""
    return oracles.run_reference(attend, inputs.to(device), inputs.q.dtype)


@pytest.mark.parametrize("bias", [None, "shared", "per_head"])
@pytest.mark.parametrize("alibi", [False, True])
def test_packed_attention(alibi, bias, device):
    lengths_q, lengths_k = [40, 0, 3], [7, 5, 65]
    inputs = oracles.packed_inputs(lengths_q, lengths_k, head_width=16, bias=bias)
    inputs = oracles.with_alibi(inputs) if alibi else inputs
    sides = (
        oracles.cu_seqlens(lengths_q).to(device),
        oracles.cu_seqlens(lengths_k).to(device),
        max(lengths_q),
        max(lengths_k),
    )

    def attend(q, k, v, options):
        return packed_attention(q, k, v, *sides, **asked(options), return_lse=True, impl="triton")

    specify = oracles.specify_packed(oracles.cu_seqlens(lengths_q), oracles.cu_seqlens(lengths_k))
    oracles.assert_meets_specification(run(attend, inputs, device), inputs, specify)


@pytest.mark.parametrize("skip_queries", [True, False])
def test_masked_attention(skip_queries, device):
    keep = oracles.keep_mask("random", 2, 50)
    inputs = oracles.with_alibi(oracles.masked_inputs(2, 50, head_width=16, bias="shared"))

    def attend(q, k, v, options):
        return masked_attention(
            q, k, v, keep.to(device), **asked(options), skip_queries=skip_queries, return_lse=True, impl="triton"
        )

    oracles.assert_meets_specification(run(attend, inputs, device), inputs, oracles.specify_masked(keep, skip_queries))


def test_dropout_drops_the_same_weights_in_both_directions(device):
    # With v = 1 the output is Σ_j m_ij p_ij, and the gradient of v says which m_ij are 0.
    starts, q = oracles.cu_seqlens([8]).to(device), torch.zeros(8, 1, 16, device=device)
    v = torch.ones(8, 1, 16, device=device, requires_grad=True)
    torch.manual_seed(0)
    out = packed_attention(q, q, v, starts, starts, 8, 8, dropout_p=0.5, impl="triton")
    kept = torch.autograd.grad(out[:, 0, 0].sum(), v)[0][:, 0, 0] * 4
    assert torch.equal(kept, kept.round())
    assert kept.sum() == out[:, 0, 0].sum() * 4
    assert 0 < kept.sum() < 64


def test_the_output_alone_is_differentiable(device):
    keep = oracles.keep_mask("random", 1, 30)
    inputs = replace(oracles.masked_inputs(1, 30, head_width=16, grad_lse=False)).to(device)
    q = inputs.q.requires_grad_()
    masked_attention(q, inputs.k, inputs.v, keep.to(device), impl="triton").sum().backward()
    assert q.grad.transpose(1, 2)[~keep.to(device)].eq(0).all()
    assert q.grad.isfinite().all()


def test_an_unsupported_head_width_is_an_error_that_says_so(device):
    q = torch.zeros(1, 1, 5, 20, device=device)
    with pytest.raises(ValueError, match="head width of 16 to 256"):
        masked_attention(q, q, q, torch.ones(1, 5, dtype=torch.bool, device=device), impl="triton")


def leaf(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


def all_options(heads: int, tokens: tuple[int, ...], bias: tuple[int, ...], device: str) -> tuple[Any, ...]:
    """Every option, as the ops take them."""
    positions = torch.rand(*tokens, 2, device=device)
    seed = torch.tensor([3], device=device)
    return flat_options(
        Options(0.25, leaf(*bias, device=device), leaf(heads, device=device), positions, positions.clone(), 0.2, seed)
    )


@pytest.mark.parametrize("given", [True, False])
def test_packed_op_passes_opcheck(given, device):
    tensors, starts = [leaf(9, 2, 16, device=device) for _ in range(3)], oracles.cu_seqlens([4, 5]).to(device)
    options = all_options(2, (9,), (9, 2), device) if given else flat_options(Options(0.25))
    torch.library.opcheck(
        torch.ops.maskattn.packed_attention.default, (*tensors, starts, starts, 5, 5, *options, True, "triton")
    )


@pytest.mark.parametrize("skip_queries", [True, False])
def test_masked_op_passes_opcheck(skip_queries, device):
    tensors, keep = [leaf(2, 2, 7, 16, device=device) for _ in range(3)], oracles.keep_mask("random", 2, 7).to(device)
    options = all_options(2, (2, 7), (2, 7), device)
    torch.library.opcheck(
        torch.ops.maskattn.masked_attention.default, (*tensors, keep, skip_queries, *options, True, "triton")
    )


def test_compiles_without_graph_breaks_and_gives_the_eager_result_and_gradients(device):
    torch._dynamo.reset()
    starts = oracles.cu_seqlens([4, 5]).to(device)
    keep = oracles.keep_mask("random", 1, 9).to(device)
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
