"""The operations over a process group against those of one process: all options, unequal and empty parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
from distributed.processes import run_in_processes
from torch import Tensor

import maskattn
from maskattn import distributed
from maskattn.distributed import Shards
from maskattn.dropout import new_seed
from maskattn.errors import GroupError

# Rows of each of three sequences in each process; the second layout has an empty process, the third is of two. No chunk
# but one starts at a key that is a multiple of four, at which dropout draws its numbers.
LAYOUTS = (
    ((40, 0, 7), (3, 30, 0), (25, 5, 0)),
    ((0, 0, 0), (61, 9, 1), (2, 33, 0)),
    ((70, 1, 0), (20, 40, 3)),
)
WAYS = (
    ("ring", "reference"),
    ("gather", "reference"),
    ("ring", "torch"),
    ("gather", "torch"),
    ("ring", "cpu"),
    ("gather", "cpu"),
)


CASES = ("plain", "bias", "all", "large", "dropout", "all and dropout")
DROPPED = 0.4


def share_dropped(case: str) -> float:
    return DROPPED if "dropout" in case else 0.0


def impl_for(impl: str, case: str) -> str | None:
    """The C++ kernels have no dropout: a call on a CPU that names none takes another, in one process and in several."""
    return None if impl == "cpu" and share_dropped(case) else impl


def whole_inputs(layout: tuple[tuple[int, ...], ...], case: str) -> oracles.Inputs:
    total = sum(map(sum, layout))
    bias = {"bias": (total, 2), "all": (total,), "large": (total, 2), "all and dropout": (total, 2)}.get(case)
    inputs = oracles.make_inputs((total, 2, 16), (total, 2, 16), bias, (2, total), torch.float64, seed=3).to(
        torch.float64
    )
    if case == "large":
        return replace(inputs, key_bias=inputs.key_bias * 20 - 1e4)
    return oracles.with_alibi(inputs).to(torch.float64) if "all" in case else inputs


def starts_of_whole(layout: tuple[tuple[int, ...], ...]) -> Tensor:
    return oracles.cu_seqlens([sum(each) for each in zip(*layout, strict=True)])


def attend_alone(layout: Any, inputs: oracles.Inputs, impl: str, case: str = "") -> dict[str, Tensor]:
    leaves, starts = inputs.leaves(), starts_of_whole(layout)
    longest = int(starts.diff().max())
    coords = None if inputs.coords_q is None else (inputs.coords_q, inputs.coords_k)
    options = {"key_bias": leaves.get("key_bias"), "slopes": leaves.get("slopes"), "coords": coords}
    q, k, v = (leaves[name] for name in "qkv")
    options |= {"dropout_p": share_dropped(case), "impl": impl_for(impl, case)}
    torch.manual_seed(17)
    out, lse = maskattn.packed_attention(
        q, k, v, starts, starts, longest, longest, scale=inputs.scale, return_lse=True, **options
    )
    torch.autograd.backward((out, lse), (inputs.grad_out.to(out.dtype), inputs.grad_lse.to(lse.dtype)))
    return {"out": out, "lse": lse.T, **{f"d{name}": x.grad for name, x in leaves.items()}}


def attend_together(
    shards: Shards, inputs: oracles.Inputs, exchange: str, impl: str, case: str = ""
) -> dict[str, Tensor]:
    own = shards.positions
    q, k, v = (x[own].detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    leaves = {"q": q, "k": k, "v": v}
    if inputs.key_bias is not None:
        leaves["key_bias"] = inputs.key_bias[own].detach().requires_grad_()
    if inputs.slopes is not None:
        leaves["slopes"] = inputs.slopes.detach().clone().requires_grad_()
    coords = None if inputs.coords_q is None else (inputs.coords_q[own], inputs.coords_k[own])
    options = {"key_bias": leaves.get("key_bias"), "slopes": leaves.get("slopes"), "coords": coords}
    options |= {"dropout_p": share_dropped(case), "impl": impl_for(impl, case)}
    torch.manual_seed(17 + shards.rank)  # the seed of process 0 counts
    out, lse = distributed.packed_attention(
        q, k, v, shards, scale=inputs.scale, return_lse=True, exchange=exchange, **options
    )
    grads = inputs.grad_out[own].to(out.dtype), inputs.grad_lse[:, own].to(lse.dtype)
    torch.autograd.backward((out, lse), grads)
    found = {"out": out, "lse": lse.T, **{f"d{name}": x.grad for name, x in leaves.items()}}
    return {name: x.detach() for name, x in found.items()}


def read(
    shards: Shards | None, where: Any, operations: Any, inputs: oracles.Inputs, rows: Any, impl: str, case: str
) -> Any:
    """Readout, its gradients, and, without dropout, the relevance of tokens."""
    generator = torch.Generator().manual_seed(7)
    dtype = inputs.k.dtype
    q = torch.randn(3, 2, 2, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    k, v = (x[rows].detach().requires_grad_() for x in (inputs.k, inputs.v))
    bias = None if inputs.key_bias is None else inputs.key_bias[rows].detach().requires_grad_()
    options = {"key_bias": bias, "impl": impl_for(impl, case)}
    torch.manual_seed(17 + (0 if shards is None else shards.rank))
    out, weights, lse = operations.readout(
        q, k, v, *where, dropout_p=share_dropped(case), return_rows=True, return_lse=True, **options
    )
    g_out, g_lse = torch.randn(out.shape, generator=generator), torch.randn(lse.shape, generator=generator)
    g_all = torch.randn(2, 2, len(inputs.k), generator=generator)
    g_lse = g_lse.masked_fill(lse.detach().isinf(), 0)
    # What all processes hold counts in the loss of one.
    share = 1.0 if shards is None else 1 / shards.size
    loss = share * ((out * g_out).sum() + (lse.masked_fill(lse.isinf(), 0) * g_lse).sum())
    (loss + (weights * g_all[..., rows]).sum()).backward()
    found = {"out": out, "lse": lse, "dq": q.grad, "weights": weights.permute(2, 0, 1), "dk": k.grad, "dv": v.grad}
    found |= {} if bias is None else {"dkey_bias": bias.grad}
    if share_dropped(case):
        return {name: x.detach() for name, x in found.items()}
    gradients = torch.randn(4, *out.shape, generator=generator).to(dtype)
    origin = torch.randn(2, 16, generator=generator).to(dtype)
    relevance = operations.token_relevance(q, k, v, out, lse, gradients, *where, key_origin=origin, **options)
    if shards is None:
        # What the rounding of out costs relevance, where its two terms cancel.
        sequence = torch.repeat_interleave(where[0].diff().long())
        moved = inputs.k.shape[-1] ** -0.5 * torch.einsum("thd,trhd->trh", k - origin, q[sequence]).abs()
        along = (out * gradients).sum(-1).abs()[:, sequence]
        found["carried"] = (along * (weights.permute(2, 0, 1) * moved)).sum((2, 3)).T
    return {name: x.detach() for name, x in (found | {"relevance": relevance.T}).items()}


def in_one_process(rank: int, layouts: Any) -> list[Any]:
    found = []
    for layout in layouts:
        shards = Shards.of(oracles.cu_seqlens(layout[rank]))
        assert shards.lengths == layout
        for case in CASES:
            inputs = whole_inputs(layout, case)
            for exchange, impl in WAYS:
                dtype = torch.float32 if impl == "cpu" else torch.float64
                result = attend_together(shards, inputs.to(dtype), exchange, impl, case)
                found.append((layout, case, f"{exchange} {impl}", shards.positions, result))
            for impl in ("reference", "torch", "cpu"):
                own = inputs.to(torch.float32 if impl == "cpu" else torch.float64)
                result = read(shards, (shards,), distributed, own, shards.positions, impl, case)
                found.append((layout, case, f"readout {impl}", shards.positions, result))
    return found


def alone(layout: Any, inputs: oracles.Inputs, way: str, impl: str, case: str) -> dict[str, Tensor]:
    if not way.startswith("readout"):
        return attend_alone(layout, inputs, impl, case)
    starts = starts_of_whole(layout)
    return read(None, (starts, int(starts.diff().max())), maskattn, inputs, slice(None), impl, case)


def rounded_between_passes(layout: Any, inputs: oracles.Inputs, way: str, case: str) -> oracles.Results:
    """What gradients carry where impl "torch" reads the out and lse of all keys, which in one process it does not."""
    if way != "ring cpu" or not share_dropped(case):
        return {}
    starts = starts_of_whole(layout)
    torch.manual_seed(17)
    dropped = replace(inputs.to(torch.float32), dropout_p=DROPPED, dropout_seed=new_seed(inputs.q.device))
    return oracles.rounded_between_passes(oracles.specify_packed(starts, starts), dropped)


def put_together(way: str, name: str, steps: Any, expected: Tensor) -> Tensor:
    """What the processes found, as one process finds it."""
    parts = [result[name] for *_, result in steps]
    if way.startswith("readout") and name in ("out", "lse"):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    if name == "dslopes" or (way.startswith("readout") and name == "dq"):
        return torch.stack(parts).sum(dim=0)
    found = torch.full(expected.shape, torch.nan, dtype=parts[0].dtype)
    for (*_, positions, _), part in zip(steps, parts, strict=True):
        found[positions] = part
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_results_and_gradients_are_those_of_one_process(count):
    layouts = [layout for layout in LAYOUTS if len(layout) == count]
    processes = run_in_processes(in_one_process, count, layouts)
    oracle: dict[Any, Any] = {}
    compared = 0
    for steps in zip(*processes, strict=True):
        layout, case, way = steps[0][:3]
        inputs, kind, on_cpu = whole_inputs(layout, case), way.split()[0] == "readout", "cpu" in way
        if (layout, case, kind) not in oracle:
            # The kernels in one process: what lies in several may be off by twice as much, and one rounding.
            given = (inputs, "reference"), (inputs.to(torch.float32), "cpu")
            oracle[layout, case, kind] = [alone(layout, x, way, name, case) for x, name in given]
        exact, same = oracle[layout, case, kind]
        carried = {"relevance": exact.get("carried")} | rounded_between_passes(layout, inputs, way, case)
        for name in exact.keys() - {"carried"}:
            expected = exact[name]
            found, title = put_together(way, name, steps, expected), f"{layout} {case} {way} {name}"
            if on_cpu:
                oracles.assert_within_budget(found, expected, same[name], title, carried.get(name))
            else:
                difference = (found - expected).masked_fill(found == expected, 0).abs().max()
                assert difference <= 1e-9 * (1 + expected.nan_to_num(neginf=0).abs().max()), (title, difference)
            compared += 1
    assert compared > 100


def refused(rank: int) -> list[str]:
    shards = Shards.of(oracles.cu_seqlens([3]))
    errors = []

    def note(call: Any) -> None:
        with pytest.raises((GroupError, ValueError, TypeError)) as raised:
            call()
        errors.append(f"{type(raised.value).__name__}: {raised.value}")

    x = torch.randn(3, 2, 16)
    heads = torch.randn(3, 2 + rank, 16)
    note(lambda: distributed.packed_attention(heads, heads, heads, shards))
    short = x[: 3 - rank]
    note(lambda: distributed.packed_attention(short, short, short, shards))
    note(lambda: distributed.packed_attention(x, x, x, shards, scale=1.0 + rank))
    note(lambda: distributed.packed_attention(x, x, x, shards, dropout_p=0.5, impl="cpu"))
    note(lambda: distributed.packed_attention(x, x, x, shards, dropout_p=0.5 + 0.1 * rank))
    note(lambda: Shards.of(oracles.cu_seqlens([1] * (1 + rank))))
    # All are still together after it.
    assert distributed.packed_attention(x, x, x, shards).shape == x.shape
    return errors


def test_a_call_that_differs_is_an_error_in_every_process():
    first, second = run_in_processes(refused, 2)
    assert "needs the same heads" in first[0]
    assert first[0] == second[0]
    assert first[1].startswith("GroupError: ")
    assert "process 1 refused" in first[1]
    assert second[1].startswith("ValueError: ")
    assert "rows of its Shards, 3" in second[1]
    assert "needs the same scale" in first[2]
    assert "impl='cpu' has no dropout, got dropout_p=0.5" in first[3]
    assert first[3] == second[3]
    assert "needs the same dropout_p" in first[4]
    assert "needs the same number of sequences" in first[5]


def left_alone(rank: int) -> str:
    shards = Shards.of(oracles.cu_seqlens([3]))
    if rank == 1:
        return "left"
    x = torch.randn(3, 2, 16)
    with pytest.raises(GroupError, match="did not answer") as raised:
        distributed.packed_attention(x, x, x, shards)
    return str(raised.value)


def test_a_process_that_has_ended_is_an_error_and_no_hang():
    assert "look for the first error" in run_in_processes(left_alone, 2, timeout_s=5)[0]


def in_bfloat16(rank: int, layout: Any) -> list[Any]:
    shards = Shards.of(oracles.cu_seqlens(layout[rank]))
    found = []
    for case in ("plain", "bias", "all"):
        inputs = whole_inputs(layout, case).to(torch.bfloat16)
        for exchange in ("ring", "gather"):
            result = attend_together(shards, inputs, exchange, "cpu")
            found.append((layout, case, f"{exchange} cpu", shards.positions, result))
    return found


def test_bfloat16_stays_within_the_error_budget():
    layout = LAYOUTS[2]
    processes = run_in_processes(in_bfloat16, 2, layout)
    compared = 0
    for steps in zip(*processes, strict=True):
        case, way = steps[0][1:3]
        inputs = whole_inputs(layout, case).to(torch.bfloat16)
        exact = attend_alone(layout, inputs.to(torch.float64), "reference")
        same = attend_alone(layout, inputs, "reference")
        for name, expected in exact.items():
            found = put_together(way, name, steps, expected)
            oracles.assert_within_budget(found, expected, same[name], f"{case} {way} {name}")
            compared += 1
    assert compared > 30
