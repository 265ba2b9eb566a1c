"""torch.func and forward-mode AD: tangents, per-sample gradients, vmap, and what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import assert_within_budget, cu_seqlens, keep_mask, masked_inputs, packed_inputs, with_alibi, with_dropout
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from maskattn import Packing, masked_attention, pack, packed_attention, readout, token_relevance, unpack
from maskattn.attention import reference
from maskattn.attention.operations import masked_attention as masked_op
from maskattn.attention.operations import packed_attention as packed_op
from maskattn.attention.operations import readout as readout_op
from maskattn.attention.ops import flat_options
from maskattn.options import Options

# torch scripts some of its own tangents when a process first asks for one.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

IMPLS = ["torch", "reference", *(["cpu"] if importlib.util.find_spec("maskattn._native") else [])]
OPERATIONS = ["packed_attention", "masked_attention", "readout"]
LENGTHS = [5, 0, 33, 1]
STARTS = cu_seqlens(LENGTHS)
KEEP = keep_mask("random", 3, 20)
# The C++ kernels have no dropout and refuse it.
RUNS = [(impl, dropout) for impl in IMPLS for dropout in (False, True) if impl != "cpu" or not dropout]
Outputs = tuple[Tensor, ...]


def made(operation: str, impl: str, dropout: bool, bias: str = "per_head") -> tuple[Any, Callable, Callable]:
    """Inputs with every option, the public operation's op and the specification, called as f(q, k, v, options)."""
    if operation == "masked_attention":
        inputs = with_alibi(masked_inputs(3, 20, bias=bias, head_width=16))
        specify = lambda q, k, v, o: reference.masked_attention(q, k, v, KEEP, True, o)  # noqa: E731
        ours = lambda q, k, v, o: masked_op(q, k, v, KEEP, True, *flat_options(o), True, impl)  # noqa: E731
    else:
        inputs = with_alibi(packed_inputs(LENGTHS, bias=bias, head_width=16))
        specify = lambda q, k, v, o: reference.packed_attention(q, k, v, STARTS, STARTS, o)  # noqa: E731
        ours = lambda q, k, v, o: packed_op(q, k, v, STARTS, STARTS, 33, 33, *flat_options(o), True, impl)  # noqa: E731
    if operation == "readout":
        inputs = replace(inputs, q=torch.randn(4, 3, 2, 16), coords_q=torch.rand(4, 3, 2) * 30)
        specify = lambda q, k, v, o: reference.readout(q, k, v, STARTS, o)  # noqa: E731
        ours = lambda q, k, v, o: readout_op(q, k, v, STARTS, 33, *flat_options(o), True, True, impl)  # noqa: E731
    # What an implementation leaves its backward is no output of the public operation.
    public = (0, 1, 3) if operation == "readout" else (0, 1)
    return_public = lambda *call: tuple(ours(*call)[i] for i in public)  # noqa: E731
    return with_dropout(inputs) if dropout else inputs, return_public, specify


def pushed(attend: Callable, inputs: Any, moved: dict[str, Tensor], dtype: torch.dtype) -> Outputs:
    """Tangents of the outputs for these of the inputs, run in ``dtype``; 0 of what is constant."""
    own = inputs.to(dtype)

    def f(*leaves: Tensor) -> Outputs:
        given = dict(zip(moved, leaves, strict=True))
        options = replace(own.options, key_bias=given["key_bias"], slopes=given["slopes"])
        outputs = attend(given["q"], given["k"], given["v"], options)
        return tuple(x.masked_fill(x.isinf(), 0) for x in outputs)

    leaves = own.leaves()
    return jvp(f, tuple(x.detach() for x in leaves.values()), tuple(moved[name].to(dtype) for name in leaves))[1]


@pytest.mark.parametrize(("impl", "dropout"), RUNS)
@pytest.mark.parametrize("bias", ["shared", "per_head"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_tangents_meet_the_specification(operation, bias, impl, dropout):
    inputs, ours, specify = made(operation, impl, dropout, bias)
    moved = {name: torch.randn_like(x) for name, x in inputs.leaves().items()}
    exact, same = (pushed(specify, inputs, moved, dtype) for dtype in (torch.float64, torch.float32))
    got = pushed(ours, inputs, moved, torch.float32)
    assert len(got) >= 2
    for number, (mine, *expected) in enumerate(zip(got, exact, same, strict=True)):
        assert_within_budget(mine, *expected, f"tangent {number}")
        assert mine.abs().max() > 0.01


def test_the_tangent_of_many_queries_is_that_of_each_part_of_them():
    """Two heads of 1500 × 1500 scores are more than a tangent forms at once."""
    x, direction = packed_inputs([1500], head_width=16), torch.randn(1500, 2, 16)

    def attend(q: Tensor) -> Tensor:
        starts_q, starts_k = cu_seqlens([len(q)]), cu_seqlens([1500])
        return packed_attention(q, x.k, x.v, starts_q, starts_k, len(q), 1500, impl="torch")

    whole = jvp(attend, (x.q,), (direction,))[1]
    for part in (slice(0, 300), slice(1200, 1500)):
        torch.testing.assert_close(whole[part], jvp(attend, (x.q[part],), (direction[part],))[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alone", ["q", "k", "v", "key_bias"])
def test_one_input_may_move_alone_and_forward_ad_says_what_jvp_says(alone, impl):
    inputs, _, _ = made("packed_attention", impl, False)
    where = STARTS, STARTS, 33, 33
    named = {name: getattr(inputs, name) for name in ("q", "k", "v", "key_bias")}
    direction = torch.randn_like(named[alone])

    def attend(x: Tensor) -> Tensor:
        given = named | {alone: x}
        return packed_attention(given["q"], given["k"], given["v"], *where, key_bias=given["key_bias"], impl=impl)

    expected = jvp(attend, (named[alone],), (direction,))[1]
    step = 1e-2
    slope = (attend(named[alone] + step * direction) - attend(named[alone] - step * direction)) / (2 * step)
    torch.testing.assert_close(expected, slope, rtol=0.02, atol=1e-3)
    for leaf in (named[alone], named[alone].clone().requires_grad_()):
        with forward_ad.dual_level():
            out = attend(forward_ad.make_dual(leaf, direction))
            assert torch.equal(forward_ad.unpack_dual(out).tangent, expected)


def test_masked_attention_and_packing_move_through_their_public_doors():
    x, direction = torch.randn(3, 2, 20, 16), torch.randn(3, 2, 20, 16)
    packing = Packing.from_keep(KEEP)

    def dense(x: Tensor) -> Tensor:
        return masked_attention(x, x, x, KEEP)

    def packed(x: Tensor) -> Tensor:
        rows = pack(x.transpose(1, 2), packing)
        lengths = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
        return unpack(packed_attention(rows, rows, rows, *lengths), packing).transpose(1, 2)

    for transform in (lambda f: jvp(f, (x,), (direction,))[1], lambda f: grad(lambda x: f(x).sin().sum())(x)):
        torch.testing.assert_close(transform(dense), transform(packed))
        background = ~KEEP[:, None, :, None].expand_as(x)
        assert (transform(dense)[background] == 0).all()
        assert transform(dense).abs().max() > 0.01


def test_poisoned_background_reaches_no_tangent():
    background = ~KEEP[:, None, :, None]
    x, direction = torch.randn(3, 2, 20, 16), torch.randn(3, 2, 20, 16)
    results = []
    for poison in (0.0, float("nan")):
        point, moved = x.masked_fill(background, poison), direction.masked_fill(background, poison)
        results.append(jvp(lambda x: masked_attention(x, x, x, KEEP), (point,), (moved,))[1])
    assert torch.equal(*results)


def small(operation: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A float64 function of one tensor through an operation."""
    starts, keep = cu_seqlens([1, 3]), torch.tensor([[True, False, True, True]])
    k = torch.randn(4, 1, 4, dtype=torch.float64)
    if operation == "packed_attention":
        return lambda x: packed_attention(x, x.sin(), k, starts, starts, 3, 3), torch.randn_like(k)
    if operation == "masked_attention":
        dense = k.transpose(0, 1)[None]
        return lambda x: masked_attention(x, x.sin(), dense, keep), torch.randn_like(dense)
    return lambda x: readout(x[:2, None], x.sin(), k, starts, 3), torch.randn_like(k)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_jacobians_agree_forward_and_backward(operation):
    f, x = small(operation)
    backward = jacrev(f)(x)
    assert backward.abs().max() > 0.01
    torch.testing.assert_close(jacfwd(f)(x), backward)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x), backward)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_samples_are_mapped_over_with_their_gradients_and_tangents(operation):
    f, x = small(operation)
    xs = torch.stack([x, x.cos(), x + 1], dim=1)
    directions = torch.randn_like(xs)
    each = [xs[:, i] for i in range(3)]

    def loss(x: Tensor) -> Tensor:
        return f(x).sin().sum()

    torch.testing.assert_close(vmap(f, 1)(xs), torch.stack([f(x) for x in each]))
    torch.testing.assert_close(vmap(grad(loss), 1)(xs), torch.stack([grad(loss)(x) for x in each]))

    def push(x: Tensor, direction: Tensor) -> Tensor:
        return jvp(f, (x,), (direction,))[1]

    expected = [push(xs[:, i], directions[:, i]) for i in range(3)]
    torch.testing.assert_close(vmap(push, 1)(xs, directions), torch.stack(expected))


def test_padding_masks_are_mapped_over():
    x, keeps = torch.randn(2, 2, 7, 16), torch.rand(4, 2, 7) > 0.4

    def loss(scale: Tensor, keep: Tensor) -> Tensor:
        return masked_attention(scale * x, x, x, keep, skip_queries=False).square().sum()

    scales = torch.linspace(0.5, 2, 4)
    got = vmap(grad(loss))(scales, keeps)
    torch.testing.assert_close(got, torch.stack([grad(loss)(*each) for each in zip(scales, keeps, strict=True)]))
    got = vmap(loss, (None, 0))(scales[0], keeps)
    torch.testing.assert_close(got, torch.stack([loss(scales[0], keep) for keep in keeps]))


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: lambda keep: grad(lambda s: f(keep) * s)(torch.ones(()))])
def test_a_mask_that_is_mapped_over_cannot_be_packed_and_the_error_says_so(wrap):
    with pytest.raises(
        ValueError, match=r"a mask that torch\.vmap maps over; build the Packing outside, or use masked"
    ):
        vmap(wrap(lambda keep: Packing.from_keep(keep).indices.sum()))(torch.rand(3, 2, 7) > 0.4)


def test_dropout_under_vmap_follows_its_randomness():
    x = torch.randn(3, 1, 1, 8, 16)
    keep = torch.ones(1, 8, dtype=torch.bool)

    def attend(x: Tensor) -> Tensor:
        return masked_attention(x, x, x, keep, dropout_p=0.5)

    same, different = (vmap(attend, randomness=each)(x[:1].expand_as(x)) for each in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_second_derivatives_are_refused_by_name_under_every_transform(operation):
    f, x = small(operation)

    def loss(x: Tensor) -> Tensor:
        return f(x).sin().sum()

    def push(x: Tensor) -> Tensor:
        return jvp(loss, (x,), (torch.ones_like(x),))[1]

    refused = (hessian(loss), grad(push), lambda x: jvp(grad(loss), (x,), (x,)), jacrev(jacrev(loss)), jacfwd(push))
    for transform in refused:
        with pytest.raises(NotImplementedError, match=f"{operation} has no second derivative"):
            transform(x)


def test_places_have_no_tangent_and_relevance_no_derivative():
    x, positions = torch.randn(5, 2, 16), torch.rand(5, 2)
    starts = cu_seqlens([5])

    def of_places(positions: Tensor) -> Tensor:
        return packed_attention(x, x, x, starts, starts, 5, 5, coords=positions, slopes=torch.ones(2))

    for transform in (grad(lambda positions: of_places(positions).sum()), lambda x: jvp(of_places, (x,), (x,))):
        with pytest.raises(NotImplementedError, match="coords have no derivative"):
            transform(positions)
    placed = grad(lambda x: packed_attention(x, x, x, starts, starts, 5, 5, coords=positions, slopes=x[0, :, 0]).sum())
    assert placed(x).isfinite().all()
    read, lse = readout(x[None, :1], x, x, starts, 5, return_lse=True)

    def relevance(k: Tensor) -> Tensor:
        return token_relevance(x[None, :1], k, x, read, lse, read[None], starts, 5)

    for transform in (grad(lambda k: relevance(k).sum()), lambda k: jvp(relevance, (k,), (k,))):
        with pytest.raises(NotImplementedError, match="token_relevance has no derivative"):
            transform(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="token_relevance has no derivative"):
        relevance(forward_ad.make_dual(x, x))
    torch.testing.assert_close(vmap(relevance)(torch.stack([x, x + 1])), torch.stack([relevance(x), relevance(x + 1)]))


def test_the_lse_that_was_not_asked_for_has_no_tangent_to_give():
    x, starts = torch.randn(5, 2, 16), cu_seqlens([5])
    without, with_lse = (
        jvp(lambda x, a=asked: packed_attention(x, x, x, starts, starts, 5, 5, return_lse=a, impl="torch"), (x,), (x,))[
            1
        ]
        for asked in (False, True)
    )
    torch.testing.assert_close(without, with_lse[0])
    options = Options(0.25)
    exact = jvp(lambda x: reference.packed_attention(x, x, x, starts, starts, options), (x.double(),), (x.double(),))[1]
    torch.testing.assert_close(with_lse[1].double(), exact[1], rtol=1e-5, atol=1e-5)


def registered(name: str) -> tuple[Callable, Tensor]:
    """An operation as torch.ops has it, of one tensor, and that tensor."""
    op, x, starts, none = (
        getattr(torch.ops.maskattn, name),
        torch.randn(5, 2, 16),
        cu_seqlens([5]),
        flat_options(Options(1.0)),
    )
    rows, lse, indices = torch.arange(5, dtype=torch.int32), torch.zeros(2, 5), torch.arange(5)
    sequences, read_lse, no_rest = (starts, starts, 5, 5), torch.zeros(1, 1, 2), torch.zeros(0)
    calls = {
        "packed_attention": lambda x: op(x, x, x, *sequences, *none, True, "torch"),
        "packed_attention_backward": lambda x: op(x, None, x, x, x, x, lse, no_rest, *sequences, *none, "torch"),
        "masked_attention": lambda x: op(*[x[None]] * 3, torch.ones(1, 2).bool(), False, *none, True, "torch"),
        "masked_attention_backward": lambda x: op(
            x[None], None, *[x[None]] * 4, lse.T[None], no_rest, torch.ones(1, 2).bool(), False, *none, "torch"
        ),
        "readout": lambda x: op(x[None, :1], x, x, starts, 5, *none, True, True, "torch"),
        "readout_backward": lambda x: op(
            x[None, :1], None, None, x[None, :1], x, x, x[None, :1], read_lse, no_rest, starts, 5, *none, "torch"
        ),
        "token_relevance": lambda x: op(
            x[None, :1], x, x, x[None, :1], read_lse, x[None, None, :1], None, None, starts, 5, *none, "torch"
        ),
        "gather_rows": lambda x: op(x, indices, rows),
        "scatter_rows": lambda x: op(x, indices, rows),
    }
    return calls[name], x


REGISTERED = [
    *(f"{name}{end}" for name in OPERATIONS for end in ("", "_backward")),
    *("token_relevance", "gather_rows", "scatter_rows"),
]


@pytest.mark.parametrize("name", REGISTERED)
def test_an_operation_of_torch_ops_refuses_a_tangent_instead_of_dropping_it(name):
    call, x = registered(name)
    call(x)
    with pytest.raises(NotImplementedError, match=f"no forward-mode derivative, got a tangent in maskattn::{name}"):
        jvp(call, (x,), (x,))
    for leaf in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"a tangent in maskattn::{name}"):
            call(forward_ad.make_dual(leaf, x))
        with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="tangent"):
            call(forward_ad.make_dual(leaf, x))
    with forward_ad.dual_level():
        call(x)  # what is constant within a level runs


def test_every_registered_operation_is_asked_about_tangents():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("maskattn::")}
    assert names == set(REGISTERED)


def test_compiled_code_refuses_a_tangent_instead_of_dropping_it():
    x, starts = torch.randn(5, 2, 16), cu_seqlens([5])

    def attend(x: Tensor) -> Tensor:
        return packed_attention(x, x, x, starts, starts, 5, 5)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attend(x))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"under torch\.compile has no forward-mode"):
        compiled(forward_ad.make_dual(x, x))
