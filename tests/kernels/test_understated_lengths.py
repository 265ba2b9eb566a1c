"""A ``max_seqlen`` that is too small, which only the device can find out, gives NaN and never a stray write."""

from __future__ import annotations

import pytest
import torch
from oracles import cu_seqlens, packed_inputs, with_alibi
from readout_cases import make_readout
from red_zones import RedZones

from maskattn.kernels.attention.backward import packed_backward
from maskattn.kernels.attention.forward import packed_forward
from maskattn.kernels.readout.forward import readout_forward
from maskattn.kernels.readout.relevance import token_relevance
from maskattn.operands import Sequences
from maskattn.results import Outputs


@pytest.fixture
def red_zones(monkeypatch) -> RedZones:
    return RedZones(monkeypatch)


@pytest.mark.parametrize("lengths", [[150, 3, 90], [100]], ids=str)
@pytest.mark.parametrize("announced", [(10, 300), (100, 10), (0, 0)], ids=str)
def test_rows_of_longer_sequences_are_nan_and_nothing_else_is_written(announced, lengths, device, red_zones):
    x = with_alibi(packed_inputs(lengths, bias="per_head", head_width=16)).to(device)
    starts = cu_seqlens(lengths).to(device)
    sequences = Sequences(starts, starts, *announced)
    out, lse, rest = packed_forward(x.q, x.k, x.v, sequences, x.options)
    grads = packed_backward(x.grads, x.qkv, Outputs(out, lse, rest), sequences, x.options)
    red_zones.check()
    longer_q, longer_k = (
        torch.repeat_interleave(torch.tensor([n > most for n in lengths]), torch.tensor(lengths)).to(device)
        for most in announced
    )
    for result in (out, lse.T, grads.q):
        assert result[longer_q].isnan().all()
        assert result[~longer_q].isfinite().all()
    of_keys = longer_k | longer_q
    for grad in (grads.k, grads.v, grads.key_bias):
        assert grad[of_keys].isnan().all()
        assert grad[~of_keys].isfinite().all()


@pytest.mark.parametrize("queries", [1, 3])
def test_rows_and_relevance_of_longer_sequences_are_nan_in_a_readout(queries, device, red_zones):
    lengths = (1100, 40)
    case = make_readout(lengths, queries, head_width=16, bias="shared").to(device)
    x, starts = case.inputs, case.sides[0]
    out, lse, _, rows = readout_forward(x.q, x.k, x.v, starts, 50, x.options, True)
    relevance = token_relevance(x.q, x.k, x.v, out, lse, x.grad_out[None], None, None, starts, 50, x.options)
    red_zones.check()
    # These do not depend on the stated length.
    assert out.isfinite().all()
    assert lse.isfinite().all()
    for result in (rows.flatten(0, 1).T, relevance.T):
        assert result[:1100].isnan().all()
        assert result[1100:].isfinite().all()


def test_reads_and_writes_outside_a_buffer_are_found(red_zones):
    x = torch.zeros(4)
    red_zones.check()
    assert torch.as_strided(x, (8,), (1,), x.storage_offset())[4:].isnan().all()
    torch.as_strided(x, (8,), (1,), x.storage_offset())[4] = 1.0
    with pytest.raises(AssertionError):
        red_zones.check()
