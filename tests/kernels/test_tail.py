"""Rows of a packed buffer beyond its last sequence are treated as queries without keys, in outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from launch import packed_sequences
from oracles import packed_inputs, with_alibi
from readout_cases import make_readout

from maskattn import packed_attention
from maskattn.kernels.attention.backward import packed_backward
from maskattn.kernels.attention.forward import packed_forward
from maskattn.kernels.readout.forward import readout_forward
from maskattn.kernels.readout.gradient import readout_backward
from maskattn.kernels.readout.relevance import token_relevance
from maskattn.operands import QKV, KeySequences
from maskattn.results import Outputs, ReadoutGradients


@pytest.mark.parametrize("held", [[5, 7], [12], [0, 0], [12, 0, 3]], ids=str)
@pytest.mark.parametrize("bias", [None, "shared", "per_head"])
def test_rows_beyond_the_last_sequence_are_zero_and_change_nothing(held, bias, device):
    buffer = with_alibi(packed_inputs([40], bias=bias, head_width=16)).to(device)
    sequences, n = packed_sequences(held, held, device), sum(held)
    out, lse, rest = packed_forward(buffer.q, buffer.k, buffer.v, sequences, buffer.options)
    grads = packed_backward(buffer.grads, buffer.qkv, Outputs(out, lse, rest), sequences, buffer.options)
    assert (out[n:] == 0).all()
    assert (lse[:, n:] == float("-inf")).all()
    for name in ("q", "k", "v", "key_bias"):
        if getattr(buffer, name) is not None:
            grad = getattr(grads, name)
            assert (grad[n:] == 0).all()
            assert grad[:n].isfinite().all()
            assert n == 0 or grad[:n].abs().max() > 0
    assert out[:n].isfinite().all()
    assert grads.slopes.isfinite().all()


@pytest.mark.parametrize("held", [(5, 7), (0, 0)], ids=str)
@pytest.mark.parametrize("bias", [None, "shared", "per_head"])
@pytest.mark.parametrize("queries", [1, 3])
def test_keys_of_a_readout_beyond_the_last_sequence_are_zero(held, bias, queries, device):
    n = sum(held)
    # One sequence more than the buffer holds: its keys are the rows beyond the last sequence.
    case = make_readout((*held, 9), queries, head_width=16, bias=bias, grad_rows=True).to(device)
    x, (starts, longest) = case.inputs, case.sides
    sides, q = (starts[:-1].contiguous(), longest), x.q[:-1]
    out, lse, rest, rows = readout_forward(q, x.k, x.v, *sides, x.options, True)
    given = ReadoutGradients(x.grad_out[:-1], x.grad_lse[:-1], case.grad_rows)
    grads = readout_backward(given, QKV(q, x.k, x.v), Outputs(out, lse, rest), KeySequences(*sides), x.options)
    relevance = token_relevance(q, x.k, x.v, out, lse, x.grad_out[:-1][None], None, None, *sides, x.options)
    tails = [rows[..., n:], relevance[:, n:], grads.k[n:], grads.v[n:]]
    if bias is not None:
        tails.append(grads.key_bias[n:])
    assert all((tail == 0).all() for tail in tails)
    assert all(x.isfinite().all() for x in (rows, relevance, grads.q, grads.k, grads.v, out))


def test_a_buffer_that_is_too_long_is_refused_where_its_lengths_can_be_read(device):
    x = torch.randn(14, 2, 16, device=device)
    starts = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    call = x, x, x, starts, starts, 7, 7
    if device == "cpu":
        with pytest.raises(ValueError, match="end with the number of rows, 14"):
            packed_attention(*call, impl="triton")
    else:
        assert (packed_attention(*call, impl="triton")[12:] == 0).all()
