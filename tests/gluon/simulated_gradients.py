"""Run backward in one pass in the simulator on the inputs of ``oracles``, and judge it by the one error budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from oracles import Inputs, assert_meets_specification, cu_seqlens, specify_packed
from simulated_launch import Plant, simulating
from torch import Tensor

from maskattn.kernels.gluon import backward, forward
from maskattn.kernels.gluon.configs import GradientConfig
from maskattn.operands import QKV, Sequences
from maskattn.results import OutputGradients, Outputs

__all__ = ["check", "differentiate"]


def differentiate(
    inputs: Inputs,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    config: GradientConfig,
    seed: int = 0,
    *plants: Plant,
) -> dict[str, Tensor]:
    """out, lse and the gradients, by name."""
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    sequences = Sequences(cu_seqlens(lengths_q), cu_seqlens(lengths_k), *longest)
    qkv = QKV(inputs.q, inputs.k, inputs.v)
    with simulating():
        outputs = Outputs(*forward.packed_forward(inputs.q, inputs.k, inputs.v, sequences, inputs.options))
    with simulating(seed, *plants):
        given = OutputGradients(inputs.grad_out, inputs.grad_lse), qkv, outputs, sequences, inputs.options
        grads: Any = backward.packed_backward(*given, config)
    found = {f"d{name}": x for name, x in vars(grads).items() if x is not None}
    return {"out": outputs.out, "lse": outputs.lse, **found}


def check(
    inputs: Inputs,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    config: GradientConfig,
    seed: int = 0,
    *plants: Plant,
) -> None:
    """All gradients are within the budget."""
    __tracebackhide__ = True
    pytest.importorskip("triton")
    results = differentiate(inputs, lengths_q, lengths_k, config, seed, *plants)
    assert_meets_specification(results, inputs, specify_packed(cu_seqlens(lengths_q), cu_seqlens(lengths_k)))
