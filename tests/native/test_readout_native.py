"""The C++ readout and token relevance against the specification, on every instruction set of this machine.

Dimension key: B sequences, T packed tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from native_attention import as_numpy, unwritten
from oracles import Inputs, assert_within_budget, cu_seqlens, rounded_between_passes
from torch import Tensor

from maskattn import _native
from maskattn.attention import reference
from maskattn.options import Options

SETS = _native.instruction_sets()
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (5, 0, 1, 130, 0, 48)
OPTIONS = ("plain", "bias", "bias of each head", "places", "all")


@dataclass(frozen=True)
class Case:
    """Inputs of a readout and the gradients of its outputs, together with the inputs of token relevance."""

    starts: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    options: Options
    grad_out: Tensor
    grad_lse: Tensor
    grad_rows: Tensor

    def floats(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype."""
        tensors = {name: x.to(dtype) for name, x in vars(self).items() if isinstance(x, Tensor) and name != "starts"}
        given = {name: x.to(dtype) for name, x in vars(self.options).items() if isinstance(x, Tensor)}
        wide = torch.promote_types(dtype, torch.float32)
        given |= {name: getattr(self.options, name).to(wide) for name in given if "coords" in name}
        return replace(self, **tensors, options=replace(self.options, **given))


def case_of(
    queries: int, width: int, dtype: torch.dtype, options: str = "all", lengths: Any = LENGTHS, heads: int = 3
) -> Case:
    generator = torch.Generator().manual_seed(queries * 1000 + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    total, batch = sum(lengths), len(lengths)
    given: dict[str, Tensor] = {}
    if "bias" in options or options == "all":
        given["key_bias"] = normal(total) if options == "bias" else normal(total, heads)
        given["key_bias"][total // 2 : total // 2 + 1] = float("-inf")
    if options in ("places", "all"):
        places = torch.randint(0, 40, (total + batch * queries, 2), generator=generator).float()
        places[::5] = float("nan")
        given |= {"coords_k": places[:total], "coords_q": places[total:].view(batch, queries, 2)}
        given["slopes"] = 0.2 * torch.rand(heads, generator=generator)
    rows = (normal(batch, queries, heads, width), normal(total, heads, width), normal(total, heads, width))
    grads = normal(batch, queries, heads, width).to(dtype), normal(batch, queries, heads), normal(queries, heads, total)
    return Case(cu_seqlens(lengths), *(x.to(dtype) for x in rows), Options(width**-0.5, **given), *grads)


def terms_of(options: Options) -> dict[str, Any]:
    return {name: as_numpy(getattr(options, name)) for name in ("key_bias", "coords_q", "coords_k", "slopes")}


def run_native(case: Case, row_gradients: bool = True, **how: Any) -> dict[str, Tensor]:
    """Outputs and gradients."""
    x, dtype = case.options, case.q.dtype
    results = {
        "out": unwritten(case.q.shape, dtype),
        "lse": unwritten(case.q.shape[:3], torch.float32),
        "rows": unwritten(case.grad_rows.shape, torch.float32),
    }
    inputs, starts = [as_numpy(t) for t in (case.q, case.k, case.v)], case.starts.numpy()
    out, lse, rows = map(as_numpy, results.values())
    rest = as_numpy(unwritten(case.q.shape[:3], torch.float32))
    _native.readout_forward(*inputs, starts, out, lse, scale=x.scale, rows=rows, lse_rest=rest, **terms_of(x), **how)
    grads = {f"d{name}": unwritten(getattr(case, name).shape, dtype) for name in "qkv"}
    learnt = {
        f"d{name}": unwritten(getattr(x, name).shape, torch.float32)
        for name in ("key_bias", "slopes")
        if getattr(x, name) is not None
    }
    _native.readout_backward(
        *(as_numpy(case.grad_out), *inputs, out, lse, starts, *map(as_numpy, grads.values())),
        scale=x.scale,
        lse_rest=rest,
        grad_lse=as_numpy(case.grad_lse),
        grad_rows=as_numpy(case.grad_rows) if row_gradients else None,
        dbias=as_numpy(learnt.get("dkey_bias")),
        dslopes=as_numpy(learnt.get("dslopes")),
        **terms_of(x),
        **how,
    )
    return results | grads | learnt


def specify(case: Case, dtype: torch.dtype, row_gradients: bool = True) -> dict[str, Tensor]:
    own = case.floats(dtype)
    named = {"dq": own.q, "dk": own.k, "dv": own.v, "dkey_bias": own.options.key_bias, "dslopes": own.options.slopes}
    leaves = {name: x.detach().requires_grad_() for name, x in named.items() if x is not None}
    options = replace(own.options, key_bias=leaves.get("dkey_bias"), slopes=leaves.get("dslopes"))
    out, lse, rows = reference.readout(leaves["dq"], leaves["dk"], leaves["dv"], case.starts, options)
    loss = (out * own.grad_out).sum() + (lse.masked_fill(lse.isinf(), 0) * own.grad_lse).sum()
    loss = loss + (rows * own.grad_rows).sum() if row_gradients else loss
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return {"out": out, "lse": lse, "rows": rows} | grads


def carried_by_outputs(case: Case, row_gradients: bool) -> dict[str, Tensor]:
    """The error that rounding out and lse causes in gradients; a row's gradient counts as one more channel of out."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        out, lse, rows = reference.readout(q, k, v, case.starts, options)
        of_key = (rows * case.grad_rows.to(rows.dtype) * row_gradients).permute(2, 0, 1)  # [T, R, H]
        sequence = torch.repeat_interleave(torch.arange(len(q)), case.starts.diff())
        return torch.cat([out, torch.zeros_like(lse).index_add(0, sequence, of_key)[..., None]], -1), lse

    grad_out = torch.cat([case.grad_out, torch.ones_like(case.grad_out[..., :1])], -1)
    options = {name: value for name, value in vars(case.options).items() if name != "scale"}
    scale = case.options.scale
    inputs = Inputs(case.q, case.k, case.v, options.pop("key_bias"), grad_out, case.grad_lse, scale, **options)
    return rounded_between_passes(attend, inputs)


def check(case: Case, row_gradients: bool = True, **how: Any) -> None:
    got = run_native(case, row_gradients, **how)
    exact, same, single = (
        specify(case, dtype, row_gradients) for dtype in (torch.float64, case.q.dtype, torch.float32)
    )
    carried = carried_by_outputs(case, row_gradients)
    assert got.keys() == exact.keys()
    for name in got:
        expected = single if name in ("lse", "rows") else same
        assert_within_budget(got[name], exact[name], expected[name], name, carried.get(name))


@pytest.mark.parametrize("width", [16, 24, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_readout_meets_the_specification(instruction_set, dtype, queries, width):
    check(case_of(queries, width, dtype), instruction_set=instruction_set)


@pytest.mark.parametrize("row_gradients", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_every_option_meets_the_specification(instruction_set, dtype, options, row_gradients):
    check(case_of(2, 32, dtype, options), row_gradients, instruction_set=instruction_set)


@pytest.mark.parametrize("instruction_set", SETS)
def test_a_sequence_of_many_runs_meets_the_specification(instruction_set):
    check(case_of(3, 64, torch.float32, "all", (1500, 3, 2000), heads=8), instruction_set=instruction_set)


def test_keys_that_all_have_a_bias_of_minus_infinity_leave_nothing():
    case = case_of(2, 32, torch.float32, "bias", (7, 60))
    case.options.key_bias[:7] = float("-inf")
    got = run_native(case)
    assert (got["lse"][0] == float("-inf")).all()
    for name in ("out", "dq"):
        assert (got[name][0] == 0).all()
    for name in ("dk", "dv", "dkey_bias"):
        assert (got[name][:7] == 0).all()
    assert (got["rows"][..., :7] == 0).all()
    check(case)


def test_no_sequence_and_no_key_are_allowed():
    for lengths in ((), (0, 0)):
        got = run_native(case_of(2, 16, torch.float32, "all", lengths) if lengths else empty_case())
        assert (got["out"] == 0).all()
        assert (got["dq"] == 0).all()
        assert (got["lse"] == float("-inf")).all()


def empty_case() -> Case:
    case = case_of(2, 16, torch.float32, "plain", (0,))
    fewer = {name: getattr(case, name)[:0] for name in ("q", "grad_out", "grad_lse")}
    return replace(case, **fewer, starts=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 64])
def test_strided_inputs_are_as_contiguous_ones(dtype, width):
    case = case_of(3, width, dtype)

    def scattered(x: Tensor) -> Tensor:
        """Last axis contiguous, the others in reverse order of memory with gaps."""
        wide = torch.full((*reversed(x.shape[:-1]), x.shape[-1] + 8), float("nan"), dtype=x.dtype)
        view = wide.permute(*reversed(range(x.ndim - 1)), x.ndim - 1)[..., : x.shape[-1]]
        return view.copy_(x)

    strided = replace(case, **{name: scattered(getattr(case, name)) for name in ("q", "k", "v", "grad_out")})
    expected = run_native(case)
    for name, got in run_native(strided).items():
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(3000,), (5, 700, 0, 1, 48, 49)])
def test_the_number_of_threads_changes_no_bit(dtype, lengths):
    case = case_of(5, 64, dtype, "all", lengths, heads=4)
    expected, scores = run_native(case, threads=1), relevance(case, 20, True, threads=1)
    for threads in (2, 3):
        for name, got in run_native(case, threads=threads).items():
            assert torch.equal(got, expected[name]), name
        assert torch.equal(relevance(case, 20, True, threads=threads), scores)


def class_inputs(case: Case, classes: int, each: bool) -> tuple[Tensor, Tensor, Tensor]:
    """g of every class and both origins, per token or shared."""
    generator = torch.Generator().manual_seed(classes)
    T, H, D = case.k.shape
    shape = (T, H, D) if each else (H, D)
    sizes = ((classes, *case.q.shape), shape, shape)
    return tuple(torch.randn(size, generator=generator).to(case.q.dtype) for size in sizes)


def relevance(case: Case, classes: int, each: bool, origins: bool = True, **how: Any) -> Tensor:
    x = case.options
    g, key_origin, value_origin = class_inputs(case, classes, each)
    out, lse = unwritten(case.q.shape, case.q.dtype), unwritten(case.q.shape[:3], torch.float32)
    inputs, starts = [as_numpy(t) for t in (case.q, case.k, case.v)], case.starts.numpy()
    _native.readout_forward(*inputs, starts, as_numpy(out), as_numpy(lse), scale=x.scale, **terms_of(x), **how)
    result = unwritten((classes, case.k.shape[0]), torch.float32)
    where = {"key_origin": as_numpy(key_origin), "value_origin": as_numpy(value_origin)} if origins else {}
    _native.token_relevance(
        *(*inputs, as_numpy(out), as_numpy(lse), as_numpy(g), starts, as_numpy(result)),
        scale=x.scale,
        **where,
        **terms_of(x),
        **how,
    )
    return result


def specified_relevance(case: Case, classes: int, each: bool, origins: bool, dtype: torch.dtype) -> Tensor:
    own, (g, *where) = case.floats(dtype), (x.to(dtype) for x in class_inputs(case, classes, each))
    where = where if origins else [None, None]
    return reference.token_relevance(own.q, own.k, own.v, g, *where, case.starts, own.options)


def carried_by_lse(case: Case, classes: int, each: bool, origins: bool) -> Tensor:
    """The error that rounding lse leaves in relevance: a factor on the share of each query and head."""
    own, (g, *where) = case.floats(torch.float64), (x.double() for x in class_inputs(case, classes, each))
    where = where if origins else [None, None]
    _, R, H, _ = own.q.shape
    parts = torch.eye(R * H, dtype=torch.float64).view(R * H, 1, 1, R, H, 1) * g  # [R·H, K, B, R, H, D]
    shares = reference.token_relevance(own.q, own.k, own.v, parts.flatten(0, 1), *where, case.starts, own.options)
    lse = reference.readout(own.q, own.k, own.v, case.starts, own.options)[1]
    size = lse.masked_fill(lse.isinf(), 0).abs().repeat_interleave(case.starts.diff(), 0)  # [T, R, H]
    relative = torch.finfo(torch.float32).eps / torch.finfo(case.q.dtype).eps
    return relative * (shares.abs().unflatten(0, (R * H, -1)) * size.flatten(1).T[:, None]).sum(0)


def check_relevance(case: Case, classes: int, each: bool, origins: bool = True, **how: Any) -> None:
    got = relevance(case, classes, each, origins, **how)
    specified = (specified_relevance(case, classes, each, origins, to) for to in (torch.float64, case.q.dtype))
    assert_within_budget(got, *specified, "relevance", carried_by_lse(case, classes, each, origins))


@pytest.mark.parametrize("width", [16, 24, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_token_relevance_meets_the_specification(instruction_set, dtype, queries, width):
    check_relevance(case_of(queries, width, dtype), 7, queries == 2, instruction_set=instruction_set)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("classes", "each", "origins"), [(1, False, False), (10, True, True), (143, False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_relevance_of_every_option_and_number_of_classes(instruction_set, dtype, classes, each, origins, options):
    check_relevance(case_of(2, 32, dtype, options), classes, each, origins, instruction_set=instruction_set)


def test_relevance_of_many_sequences_at_once():
    check_relevance(case_of(1, 64, torch.float32, "plain", (3,) * 700, heads=12), 70, False)


def test_no_class_gives_no_relevance():
    assert relevance(case_of(1, 16, torch.float32, "plain", (5,)), 0, False).shape == (0, 5)
