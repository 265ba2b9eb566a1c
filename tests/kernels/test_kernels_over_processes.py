"""The kernels over a process group, in the interpreter: dropout, with every other option, as in one process."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import triton
from distributed.processes import run_in_processes

import maskattn
from maskattn import distributed
from maskattn.distributed import Shards

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="gloo sends no tensors between the processes of a GPU"
)

# Rows of two sequences in each of two processes; no chunk of the second starts at a multiple of four.
LENGTHS = ((21, 6), (9, 14))
TOTAL, STARTS, LONGEST = 50, oracles.cu_seqlens([30, 20]), 30


def whole() -> oracles.Inputs:
    return oracles.with_alibi(oracles.packed_inputs([30, 20], head_width=16, bias="per_head"))


def attend(
    operation: Any, where: Any, rows: Any, dtype: torch.dtype = torch.float32, impl: str = "triton", **further: Any
) -> oracles.Results:
    """Outputs and gradients of attention, or of a readout of queries that all processes have, with every option."""
    inputs = whole().to(dtype)
    reads = operation.__name__ == "readout"
    q = inputs.q[:4].unflatten(0, (2, 2)) if reads else inputs.q[rows]
    coords_q = inputs.coords_q[:4].unflatten(0, (2, 2)) if reads else inputs.coords_q[rows]
    given = {"q": q, "k": inputs.k[rows], "v": inputs.v[rows], "bias": inputs.key_bias[rows], "slopes": inputs.slopes}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    options = {"key_bias": leaves["bias"], "slopes": leaves["slopes"], "coords": (coords_q, inputs.coords_k[rows])}
    q, k, v = (leaves[name] for name in "qkv")
    out, lse = operation(q, k, v, *where, **options, dropout_p=0.4, return_lse=True, impl=impl, **further)
    grad = torch.randn(TOTAL, *out.shape[1:], generator=torch.Generator().manual_seed(1)).to(dtype)
    # What all processes hold counts in the loss of each.
    share = 1 / where[0].size if reads and isinstance(where[0], Shards) else 1
    loss = (out * (grad[: len(out)] if reads else grad[rows])).sum() + 0.1 * (lse * lse).sum()
    (share * loss).backward()
    found = {"out": out, "lse": lse if reads else lse.T, **{f"d{name}": x.grad for name, x in leaves.items()}}
    return {name: x.detach() for name, x in found.items()}


def in_one_of(rank: int) -> list[oracles.Results]:
    shards = Shards.of(oracles.cu_seqlens(LENGTHS[rank]))
    found = []
    for exchange in ("ring", "gather"):
        torch.manual_seed(5 + rank)
        found.append(attend(distributed.packed_attention, (shards,), shards.positions, exchange=exchange))
    torch.manual_seed(5 + rank)
    return [*found, attend(distributed.readout, (shards,), shards.positions)]


def alone(number: int, dtype: torch.dtype) -> oracles.Results:
    """The specification in one process."""
    torch.manual_seed(5)
    if number == 2:
        return attend(maskattn.readout, (STARTS, LONGEST), slice(None), dtype, "reference")
    return attend(maskattn.packed_attention, (STARTS, STARTS, LONGEST, LONGEST), slice(None), dtype, "reference")


def test_dropped_weights_outputs_and_gradients_are_those_of_one_process():
    processes = run_in_processes(in_one_of, 2)
    order = torch.cat([torch.arange(0, 21), torch.arange(30, 36), torch.arange(21, 30), torch.arange(36, 50)])
    for number, way in enumerate(("ring", "gather", "readout")):
        exact, same = (alone(number, dtype) for dtype in (torch.float64, torch.float32))
        for name, expected in exact.items():
            parts = [process[number][name] for process in processes]
            if name == "dslopes" or (way == "readout" and name == "dq"):
                # Each process rounds its part of the sum.
                total = parts[0] + parts[1]
                oracles.assert_within_budget(total, expected, same[name], f"{way} {name}", carried=parts[0])
            elif way == "readout" and name in ("out", "lse"):
                oracles.assert_within_budget(parts[1], expected, same[name], f"{way} {name}")
            else:
                found = torch.cat(parts)
                oracles.assert_within_budget(found, expected[order], same[name][order], f"{way} {name}")
