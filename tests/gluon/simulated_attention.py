"""Run the Gluon forward in the simulator on the inputs of ``oracles``, and judge it by the one error budget."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from oracles import Inputs, assert_within_budget, cu_seqlens, specify_packed
from simulated_launch import Plant, simulating
from torch import Tensor

from maskattn.kernels.gluon import forward
from maskattn.kernels.gluon.configs import GluonConfig
from maskattn.operands import Sequences

__all__ = ["check", "force", "run"]


def run(
    inputs: Inputs, lengths_q: Sequence[int], lengths_k: Sequence[int], seed: int = 0, *plants: Plant
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and its rest."""
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    sequences = Sequences(cu_seqlens(lengths_q), cu_seqlens(lengths_k), *longest)
    with simulating(seed, *plants):
        return forward.packed_forward(inputs.q, inputs.k, inputs.v, sequences, inputs.options)


def check(inputs: Inputs, lengths_q: Sequence[int], lengths_k: Sequence[int], seed: int = 0, *plants: Plant) -> None:
    """Out and lse are within the budget."""
    __tracebackhide__ = True
    out, lse, rest = run(inputs, lengths_q, lengths_k, seed, *plants)
    assert (out.dtype, lse.dtype) == (inputs.q.dtype, torch.float32)
    assert rest.shape == (lse.shape if inputs.key_bias is not None else (0,))
    specify = specify_packed(cu_seqlens(lengths_q), cu_seqlens(lengths_k))

    def specified(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = inputs.to(dtype)
        return specify(x.q, x.k, x.v, x.options)

    exact = specified(torch.float64)
    assert_within_budget(out, exact[0], specified(inputs.q.dtype)[0], "out")
    # lse is float32 whatever the dtype of the inputs is.
    assert_within_budget(lse, exact[1], specified(torch.float32)[1], "lse")


def force(monkeypatch: pytest.MonkeyPatch, block_n: int, stages: int, unroll: int = 1) -> None:
    """Have every launch use these blocks."""
    monkeypatch.setattr(forward, "choose", lambda *_: GluonConfig(block_n, stages, unroll))
