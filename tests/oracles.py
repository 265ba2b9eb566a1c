"""Seeded inputs for the attention operations, and the one budget that their errors are held to.

The oracle is ``maskattn.attention.reference`` in float64. An implementation may be off by twice what the reference
itself is off when run in the implementation's dtype, plus one rounding of the largest value.

Dimension key: B sequences, N tokens, Tq and Tk packed query and key tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskattn.attention import reference
from maskattn.operands import QKV
from maskattn.options import Options
from maskattn.results import Gradients, OutputGradients

LENGTHS = (1, 15, 63, 64, 65, 111, 1000)
# Whose rows are packed and unpacked bit for bit.
ROW_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)
# Lengths of queries and of keys, where one or both are not there.
EMPTY_SIDES = [([0, 0], [3, 70]), ([3, 70], [0, 0]), ([0], [0])]
KEEP_KINDS = ("random", "blob", "all", "none", "one")


def assert_within_budget(
    kernel: Tensor,
    reference64: Tensor,
    reference_same_dtype: Tensor,
    name: str = "",
    carried: Tensor | None = None,
) -> None:
    """The error of ``kernel`` is at most twice that of the reference in its own dtype, plus one rounding.

    Held for the largest error and for the root mean square, which sees what a single large value would hide. Where
    the oracle is not finite (lse of a row without keys), the kernel must say the same.

    Args:
        kernel: what is tested.
        reference64: the oracle, float64.
        reference_same_dtype: the reference run in the dtype of the kernel's arithmetic; its dtype sets the rounding.
        name: what to call it in the message.
        carried: a part of the result whose rounding stays in it though the part may not; it counts as size.
    """
    __tracebackhide__ = True
    assert reference64.dtype == torch.float64, f"{name}: the oracle must be float64, got {reference64.dtype}"
    assert kernel.shape == reference64.shape == reference_same_dtype.shape, (
        f"{name}: shapes {tuple(kernel.shape)}, {tuple(reference64.shape)}, {tuple(reference_same_dtype.shape)}"
    )
    got, exact, same = (x.detach().double().cpu() for x in (kernel, reference64, reference_same_dtype))
    finite = exact.isfinite()
    assert torch.equal(got[~finite], exact[~finite]), f"{name}: not the oracle's infinities"
    assert got[finite].isfinite().all(), f"{name}: {int((~got[finite].isfinite()).sum())} values are not finite"
    if not finite.any():
        return
    rounding = torch.finfo(reference_same_dtype.dtype).eps
    error, error_same, size = (got - exact)[finite], (same - exact)[finite], exact[finite]
    part = torch.zeros_like(exact) if carried is None else carried.detach().double().cpu()
    for measure, norm in (("largest", _largest), ("rms", _root_mean_square)):
        budget = 2 * norm(error_same) + rounding * (norm(size) + norm(part[finite]))
        assert norm(error) <= budget, f"{name}: {measure} error {norm(error):.3e} over budget {budget:.3e}"


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def keep_mask(kind: str, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """A (B, N) bool mask: random, blob (a run of tokens, another in each sequence), all, none or one kept."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.rand(batch, tokens, generator=generator) < 0.4
    if kind == "blob":
        centre_B1 = torch.randint(tokens, (batch, 1), generator=generator)
        return (torch.arange(tokens)[None, :] - centre_B1).abs() <= tokens // 4
    if kind == "one":
        return torch.arange(tokens)[None, :] == torch.randint(tokens, (batch, 1), generator=generator)
    return torch.full((batch, tokens), {"all": True, "none": False}[kind])


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """(B + 1,) int32, where each sequence starts."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@dataclass(frozen=True)
class Inputs:
    """Differentiable inputs of an attention operation and the gradients of its outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor | None
    scale: float
    slopes: Tensor | None = None
    coords_q: Tensor | None = None
    coords_k: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    precision: str = "ieee"
    deterministic: bool = True
    query_offsets: Tensor | None = None
    key_offsets: Tensor | None = None

    def to(self, target: torch.dtype | str) -> Inputs:
        """The same values on another device or in another dtype; positions are float32 at least, seeds are ints."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        if isinstance(target, torch.dtype):
            tensors = {name: x for name, x in tensors.items() if x.is_floating_point()}
            at_least = torch.promote_types(target, torch.float32)
            return replace(self, **{n: x.to(at_least if "coords" in n else target) for n, x in tensors.items()})
        return replace(self, **{name: x.to(target) for name, x in tensors.items()})

    @property
    def options(self) -> Options:
        """What an implementation is given besides q, k and v."""
        return Options(**{field: getattr(self, field) for field in Options.__dataclass_fields__})

    @property
    def qkv(self) -> QKV:
        """q, k and v as an implementation is given them."""
        return QKV(self.q, self.k, self.v)

    @property
    def grads(self) -> OutputGradients:
        """The gradients of the outputs as a backward is given them."""
        return OutputGradients(self.grad_out, self.grad_lse)

    def leaves(self) -> dict[str, Tensor]:
        """Detached copies of what has a gradient, by name."""
        present = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return {name: x.detach().requires_grad_() for name, x in present.items() if x is not None}


DIFFERENTIABLE = ("q", "k", "v", "key_bias", "slopes")

# attend(q, k, v, options) → out, lse and whatever an implementation leaves its backward
Attend = Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, ...]]


def with_alibi(inputs: Inputs, seed: int = 0, unplaced: float = 0.1) -> Inputs:
    """The same inputs with slopes and positions on a grid, a share ``unplaced`` of the tokens without a position."""
    generator = torch.Generator().manual_seed(seed)

    def positions(x: Tensor) -> Tensor:
        shape = x.shape[:1] if x.ndim == 3 else (x.shape[0], x.shape[2])
        grid = torch.randint(0, 40, (*shape, 2), generator=generator).float()
        return grid.masked_fill(torch.rand(*shape, 1, generator=generator) < unplaced, float("nan"))

    heads = inputs.q.shape[1]
    coords_k = positions(inputs.k)
    coords_q = coords_k if inputs.q.shape == inputs.k.shape else positions(inputs.q)
    slopes = 0.2 * torch.rand(heads, generator=generator)
    return replace(inputs, slopes=slopes, coords_q=coords_q, coords_k=coords_k)


def with_dropout(inputs: Inputs, dropout_p: float = 0.3, seed: int = 1234567890123456789) -> Inputs:
    """The same inputs with some of the weights dropped."""
    return replace(inputs, dropout_p=dropout_p, dropout_seed=torch.tensor([seed]))


def as_chunks(inputs: Inputs, sequences: int, seed: int = 0) -> Inputs:
    """The same inputs as chunks of longer sequences, from any position; the keys of the first four from 4n + 0 to 3."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randint(2**20, (2, sequences), generator=generator, dtype=torch.int32)
    keys = keys // 4 * 4 + torch.arange(sequences, dtype=torch.int32) % 4
    return replace(inputs, query_offsets=queries, key_offsets=keys)


def make_inputs(
    shape_q: Sequence[int],
    shape_k: Sequence[int],
    shape_bias: Sequence[int] | None,
    shape_lse: Sequence[int] | None,
    dtype: torch.dtype,
    scale: float | None = None,
    seed: int = 0,
) -> Inputs:
    """Normal inputs; the bias and the gradient of lse are float32 as users have them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator)

    return Inputs(
        normal(shape_q).to(dtype),
        normal(shape_k).to(dtype),
        normal(shape_k).to(dtype),
        None if shape_bias is None else normal(shape_bias),
        normal(shape_q).to(dtype),
        None if shape_lse is None else normal(shape_lse),
        shape_q[-1] ** -0.5 if scale is None else scale,
    )


def packed_inputs(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int] | None = None,
    *,
    heads: int = 2,
    head_width: int = 32,
    dtype: torch.dtype = torch.float32,
    bias: str | None = None,
    grad_lse: bool = True,
    scale: float | None = None,
    seed: int = 0,
) -> Inputs:
    """Inputs of ``packed_attention``; ``bias`` is None, "shared" by the heads (Tk,) or "per_head" (Tk, H)."""
    total_q, total_k = sum(lengths_q), sum(lengths_q if lengths_k is None else lengths_k)
    shape_bias = {None: None, "shared": (total_k,), "per_head": (total_k, heads)}[bias]
    return make_inputs(
        (total_q, heads, head_width),
        (total_k, heads, head_width),
        shape_bias,
        (heads, total_q) if grad_lse else None,
        dtype,
        scale,
        seed,
    )


def masked_inputs(
    batch: int,
    tokens: int,
    queries: int | None = None,
    *,
    heads: int = 2,
    head_width: int = 32,
    dtype: torch.dtype = torch.float32,
    bias: str | None = None,
    grad_lse: bool = True,
    scale: float | None = None,
    seed: int = 0,
) -> Inputs:
    """Inputs of ``masked_attention``; ``bias`` is None, "shared" by the heads (B, N) or "per_head" (B, H, N)."""
    queries = tokens if queries is None else queries
    shape_bias = {None: None, "shared": (batch, tokens), "per_head": (batch, heads, tokens)}[bias]
    return make_inputs(
        (batch, heads, queries, head_width),
        (batch, heads, tokens, head_width),
        shape_bias,
        (batch, heads, queries) if grad_lse else None,
        dtype,
        scale,
        seed,
    )


Results = dict[str, Tensor]


def run_reference(attend: Attend, inputs: Inputs, dtype: torch.dtype) -> Results:
    """out, lse and every gradient of a reference operation, run in ``dtype``.

    Args:
        attend: called as attend(q, k, v, options) → out, lse.
        inputs: any dtype; rounded to ``dtype`` first.
    """
    inputs = inputs.to(dtype)
    leaves = inputs.leaves()
    out, lse = _attend(attend, inputs, leaves)
    # lse is −inf and constant where a row has no key.
    outputs = [(out, inputs.grad_out), (lse.masked_fill(lse.isinf(), 0), inputs.grad_lse)]
    grads = gradients_of_leaves(outputs, leaves)
    results = {"out": out.detach(), "lse": lse.detach()}
    return results | {f"d{name}": grad for name, grad in grads.items()}


def _attend(attend: Attend, inputs: Inputs, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    options = replace(inputs.options, key_bias=leaves.get("key_bias"), slopes=leaves.get("slopes"))
    out, lse = attend(leaves["q"], leaves["k"], leaves["v"], options)[:2]
    return out, lse


def named(inputs: Inputs, out: Tensor, lse: Tensor, grads: Gradients) -> Results:
    """What an implementation returned, named as :func:`run_reference` names it."""
    results = {"out": out, "lse": lse}
    for name in inputs.leaves():
        grad = getattr(grads, name)
        assert grad is not None, f"no gradient of {name}"
        assert grad.dtype == getattr(inputs, name).dtype, f"d{name} is {grad.dtype}"
        results[f"d{name}"] = grad
    return results


def gradients_of_leaves(
    outputs: Sequence[tuple[Tensor, Tensor | None]], leaves: dict[str, Tensor], retain_graph: bool = False
) -> dict[str, Tensor]:
    """Gradients of the leaves for these gradients of the outputs; 0 where nothing depends on a leaf."""
    used = [(x, grad) for x, grad in outputs if grad is not None and x.requires_grad]
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if not used:
        return zeros
    grads = torch.autograd.grad(
        [x for x, _ in used],
        list(leaves.values()),
        [grad for _, grad in used],
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return zeros | {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def rounded_between_passes(attend: Attend, inputs: Inputs, with_lse: bool = True) -> Results:
    """The parts of the gradients that carry the rounding of what forward left for backward, in float64.

    A fused backward reads out and lse back, each rounded once, where autograd still has the probabilities. With
    delta_i = Σ_d dO_id out_id, dP_ij = Σ_d dO_id v_jd, dS = p·(dP − delta): the roundings of these two sums of
    products, which autograd forms alike and so loses where one key has all the weight, enter dq, dk, dbias and dslopes
    as a gradient of lse does. That of lse (``with_lse``) enters p = exp(score − lse), hence every gradient as a factor
    of the row's incoming gradients.
    """
    dtype = inputs.q.dtype
    inputs = inputs.to(torch.float64)
    leaves = inputs.leaves()
    out, lse = _attend(attend, inputs, leaves)
    finite = lse.masked_fill(lse.isinf(), 0)

    def of_rows(x: Tensor) -> Tensor:
        """(H, Tq) ↔ (Tq, H), or (B, H, Nq) itself."""
        return x if x.ndim == 3 else x.T

    delta = of_rows((out * inputs.grad_out).abs().sum(-1)).detach()
    size = finite.detach().abs() if with_lse else torch.zeros_like(finite)
    grad_lse = None if inputs.grad_lse is None else inputs.grad_lse * size
    of_delta = gradients_of_leaves([(finite, delta)], leaves, retain_graph=True)
    of_lse = gradients_of_leaves([(out, inputs.grad_out * of_rows(size)[..., None]), (finite, grad_lse)], leaves)
    # lse is float32 whatever the inputs are.
    relative = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    return {f"d{name}": 2 * of_delta[name].abs() + relative * of_lse[name].abs() for name in leaves}


def specify_packed(starts_q: Tensor, starts_k: Tensor) -> Attend:
    """The reference ``packed_attention`` of these sequences."""
    return lambda q, k, v, options: reference.packed_attention(q, k, v, starts_q, starts_k, options)


def specify_masked(keep: Tensor, skip_queries: bool) -> Attend:
    """The reference ``masked_attention`` of this mask."""
    return lambda q, k, v, options: reference.masked_attention(q, k, v, keep, skip_queries, options)


def with_extreme_bias(inputs: Inputs, seed: int = 0) -> Inputs:
    """The same inputs with biases up to the largest and lowest finite ones and −inf among them; sequences differ."""
    bias = inputs.key_bias
    assert bias is not None
    most = torch.finfo(inputs.q.dtype).max
    choice = torch.tensor([most, -most, -most, -math.inf, most / 3, -most / 5, 0.0, 1.0])
    generator = torch.Generator().manual_seed(seed)
    drawn = choice[torch.randint(len(choice), bias.shape, generator=generator)]
    kept = torch.rand(bias.shape, generator=generator) < 0.3
    # Runs of keys that all have the lowest, all the highest, and an offset in common.
    place = torch.arange(bias.shape[0]).div(16, rounding_mode="floor") % 4
    place = place.view(-1, *[1] * (bias.ndim - 1)).expand_as(bias)
    offset = bias + min(1e4, most / 8)
    kinds = torch.stack([torch.where(kept, bias, drawn), -most + 0 * bias, offset, most + 0 * bias])
    return replace(inputs, key_bias=kinds.gather(0, place[None])[0].to(bias.dtype))


def assert_meets_specification(results: Results, inputs: Inputs, specify: Attend, carries: bool = True) -> None:
    """Every output and gradient of an implementation is within its budget.

    Args:
        results: as :func:`run_reference` names them.
        inputs: what the implementation was given; lse is float32 whatever their dtype, and judged so.
        specify: the reference, as :func:`run_reference` calls it.
        carries: whether gradients may carry the rounding of forward's lse, which is boundless for the largest lse.
    """
    __tracebackhide__ = True
    exact, same = run_reference(specify, inputs, torch.float64), run_reference(specify, inputs, inputs.q.dtype)
    single = same if inputs.q.dtype == torch.float32 else run_reference(specify, inputs, torch.float32)
    carried = rounded_between_passes(specify, inputs, with_lse=carries)
    assert results.keys() == exact.keys(), f"got {sorted(results)}, want {sorted(exact)}"
    for name, result in results.items():
        expected = (single if name == "lse" else same)[name]
        assert_within_budget(result, exact[name], expected, name, carried.get(name))
