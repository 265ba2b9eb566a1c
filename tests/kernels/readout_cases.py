"""Inputs of a readout, the specification's results for them, and a comparison with those of the launchers.

Dimension key: B sequences, T packed keys, R readout queries, H heads, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from oracles import (
    Inputs,
    Results,
    assert_within_budget,
    cu_seqlens,
    gradients_of_leaves,
    make_inputs,
    named,
    with_dropout,
)
from torch import Tensor

from maskattn.attention import reference
from maskattn.kernels.readout.forward import readout_forward
from maskattn.kernels.readout.gradient import readout_backward
from maskattn.operands import KeySequences
from maskattn.results import Outputs, ReadoutGradients

NAN = float("nan")


@dataclass(frozen=True)
class Readout:
    """Inputs (q and grad_out (B, R, H, D), grad_lse (B, R, H)), the attention rows' gradient, and the lengths."""

    inputs: Inputs
    grad_rows: Tensor | None
    lengths: tuple[int, ...]

    @property
    def sides(self) -> tuple[Tensor, int]:
        """cu_seqlens and max_seqlen."""
        return cu_seqlens(self.lengths).to(self.inputs.q.device), max(self.lengths, default=0)

    def with_inputs(self, **changes: Tensor | float | None) -> Readout:
        """A copy with other values for some of the inputs."""
        return replace(self, inputs=replace(self.inputs, **changes))

    def to(self, device: str) -> Readout:
        """A copy on another device."""
        grad_rows = None if self.grad_rows is None else self.grad_rows.to(device)
        return replace(self, inputs=self.inputs.to(device), grad_rows=grad_rows)


def pairs_of(options: Collection[str]) -> list[tuple[str, str]]:
    """The names of every two options that can be combined."""
    return [pair for pair in itertools.combinations(options, 2) if pair != ("bias", "bias_per_head")]


def make_readout(
    lengths: Sequence[int],
    queries: int = 1,
    *,
    heads: int = 2,
    head_width: int = 32,
    dtype: torch.dtype = torch.float32,
    bias: str | None = None,
    alibi: bool = False,
    dropout: bool = False,
    grad_rows: bool = False,
    scale: float | None = None,
) -> Readout:
    """Normal inputs; ``bias`` is None, "shared" by the heads (T,) or "per_head" (T, H)."""
    B, T = len(lengths), sum(lengths)
    shape_bias = {None: None, "shared": (T,), "per_head": (T, heads)}[bias]
    shapes = (B, queries, heads, head_width), (T, heads, head_width)
    inputs = make_inputs(*shapes, shape_bias, (B, queries, heads), dtype, scale)
    generator = torch.Generator().manual_seed(1)
    if alibi:
        coords_q, coords_k = (torch.randint(0, 40, (*n, 2), generator=generator).float() for n in ((B, queries), (T,)))
        coords_q[:, 1:2], coords_k[::7] = NAN, NAN
        slopes = 0.2 * torch.rand(heads, generator=generator)
        inputs = replace(inputs, slopes=slopes, coords_q=coords_q, coords_k=coords_k)
    if dropout:
        inputs = with_dropout(inputs)
    grad = torch.randn(queries, heads, T, generator=generator) if grad_rows else None
    return Readout(inputs, grad, tuple(lengths))


def run(readout: Readout, device: str) -> Results:
    """The launchers' out, lse, attention rows and gradients."""
    moved = readout.to(device)
    x, sides = moved.inputs, moved.sides
    out, lse, rest, rows = readout_forward(x.q, x.k, x.v, *sides, x.options, True)
    assert (out.dtype, lse.dtype, rows.dtype) == (x.q.dtype, torch.float32, torch.float32)
    given = ReadoutGradients(x.grad_out, x.grad_lse, moved.grad_rows)
    grads = readout_backward(given, x.qkv, Outputs(out, lse, rest), KeySequences(*sides), x.options)
    results = named(x, out, lse, grads) | {"rows": rows}
    assert all(result.is_contiguous() for result in results.values())
    return results


def assert_meets_specification(results: Results, readout: Readout) -> None:
    """Check that outputs and gradients are within the budget of ``oracles``; lse and rows are judged as float32."""
    __tracebackhide__ = True
    dtype = readout.inputs.q.dtype
    exact, same, single = (_specify(readout, x) for x in (torch.float64, dtype, torch.float32))
    carried = _rounded_between_passes(readout)
    assert results.keys() == exact.keys(), f"got {sorted(results)}, want {sorted(exact)}"
    for name, result in results.items():
        expected = (single if name in ("lse", "rows") else same)[name]
        if not exact[name].numel():
            assert result.shape == exact[name].shape, name
            continue
        assert_within_budget(result, exact[name], expected, name, carried.get(name))


def check(readout: Readout, device: str) -> None:
    """Run the launchers and compare their results with the specification's."""
    __tracebackhide__ = True
    assert_meets_specification(run(readout, device), readout)


def _specify(readout: Readout, dtype: torch.dtype) -> Results:
    """The reference's out, lse, attention rows and gradients, computed in ``dtype``."""
    (out, lse, rows), leaves = _attend(readout, dtype)
    x = readout.inputs.to(dtype)
    # lse is constant, −inf, for a query without keys.
    outputs = [(out, x.grad_out), (lse.masked_fill(lse.isinf(), 0), x.grad_lse)]
    if readout.grad_rows is not None:
        outputs.append((rows, readout.grad_rows.to(dtype)))
    grads = gradients_of_leaves(outputs, leaves)
    results = {"out": out, "lse": lse, "rows": rows} | {f"d{name}": grad for name, grad in grads.items()}
    return {name: x.detach() for name, x in results.items()}


def _rounded_between_passes(readout: Readout) -> Results:
    """As ``oracles.rounded_between_passes``: what a rounding of out and lse leaves in the gradients, rows included."""
    (out, lse, rows), leaves = _attend(readout, torch.float64)
    x = readout.inputs.to(torch.float64)
    finite = lse.masked_fill(lse.isinf(), 0)
    size = finite.detach().abs()
    of_delta = [(finite, (out * x.grad_out).abs().sum(-1).detach())]
    of_lse = [(out, x.grad_out * size[..., None])]
    if x.grad_lse is not None:
        of_lse.append((finite, x.grad_lse * size))
    if readout.grad_rows is not None:
        sequence = torch.repeat_interleave(torch.arange(len(readout.lengths)), torch.tensor(readout.lengths))
        of_lse.append((rows, readout.grad_rows.double() * size[sequence].permute(1, 2, 0)))
    relative = torch.finfo(torch.float32).eps / torch.finfo(readout.inputs.q.dtype).eps
    delta, lse_part = (gradients_of_leaves(outputs, leaves, retain_graph=True) for outputs in (of_delta, of_lse))
    return {f"d{name}": delta[name].abs() + relative * lse_part[name].abs() for name in leaves}


def _attend(readout: Readout, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """The reference's outputs and the leaf tensors that they depend on."""
    x = readout.inputs.to(dtype)
    leaves = x.leaves()
    options = replace(x.options, key_bias=leaves.get("key_bias"), slopes=leaves.get("slopes"))
    return reference.readout(leaves["q"], leaves["k"], leaves["v"], readout.sides[0], options), leaves
