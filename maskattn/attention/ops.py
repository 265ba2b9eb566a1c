"""The attention operations as torch sees them: ``torch.library`` schemas, fake kernels and autograd.

:func:`register` makes an op of an :class:`Operation`, which says what sets it apart; all else follows from the fields
of the dataclasses that an implementation is given. The implementation's name is an argument of the op. The backward is
an op of its own, so that ``torch.compile`` keeps both opaque and whole; its own derivative is refused.
``maskattn.transforms`` has what ``torch.func`` and forward-mode AD need besides.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from maskattn.attention.implementation import Implementation, implementation, keeps_rest, refuse_missing
from maskattn.attention.schema import Arguments, flat
from maskattn.operands import QKV
from maskattn.options import Options, differentiable, is_given
from maskattn.results import Gradients, OutputGradients, Outputs, Tangents
from maskattn.transforms import refuse, transformable

__all__ = ["Operation", "flat_options", "is_autocast", "register", "register_without_derivative", "without_autocast"]

Call = Callable[..., Any]

_NO_CONTEXT = nullcontext()


@dataclass(frozen=True)
class Operation:
    """The properties in which an operation differs from the others.

    Attributes:
        name: of the op, of its backward and in error messages.
        where: the dataclass that says which queries see which keys.
        asked: outputs besides ``out`` that a call may do without: each has an argument ``need_…``.
        outputs: what forward returns.
        gradients: what backward is given.
        forward, backward: the implementation's functions.
        tangent: called as tangent(qkv, where, options, tangents), returns those of ``out`` and of what is ``asked``.
        lse_shape: of q, the shape of lse.
        check: called as check(qkv, where); raises where numbers that only the op can read do not fit.
        options: their dataclass.
    """

    name: str
    where: type
    asked: tuple[str, ...]
    outputs: type[Outputs]
    gradients: type[OutputGradients]
    forward: Callable[[Implementation], Callable[..., Outputs]]
    backward: Callable[[Implementation], Callable[..., Gradients]]
    tangent: Callable[..., tuple[Tensor, ...]]
    lse_shape: Callable[[Tensor], tuple[int, ...]]
    check: Callable[[QKV, Any], None]
    options: type[Options] = Options


def register(operation: Operation) -> Call:
    """Register an operation and its backward with ``torch.library``.

    Returns:
        The op, also under ``torch.func`` and forward-mode AD; it takes the fields of QKV, of ``where`` and of the
        options, then a bool for each of ``asked`` and the implementation's name.
    """
    further = (*(f"bool need_{name}" for name in operation.asked), "str impl")
    arguments = Arguments((QKV, operation.where, operation.options), further)
    outputs = [x.name for x in fields(operation.outputs)]

    def run(*given: Any) -> tuple[Tensor, ...]:
        qkv, where, options, *asked, impl = arguments.grouped(given)
        # Here, where torch.compile and transforms have real numbers.
        operation.check(qkv, where)
        refuse_missing(impl, options)
        with without_autocast(qkv.q):
            results = operation.forward(implementation(impl))(qkv, where, options, *asked)
        return tuple([x.contiguous() for x in flat(results)])

    def fake(*given: Any) -> tuple[Tensor, ...]:
        qkv, _, options, *asked, impl = arguments.grouped(given)
        # impl "torch" pays extra for lse, and leaves it out where nothing that needs it is asked for.
        shape = operation.lse_shape(qkv.q)
        shape = shape if any(asked) or impl != "torch" else (*shape[:-1], 0)
        lse = qkv.q.new_empty(shape, dtype=_sum_dtype(qkv.q, impl))
        results = qkv.q.new_empty(qkv.q.shape), lse, lse.new_empty(lse.shape if keeps_rest(impl, options) else 0)
        if "rows" not in operation.asked:
            return results
        tokens = qkv.k.shape[0] if asked[operation.asked.index("rows")] else 0
        return *results, lse.new_empty((*qkv.q.shape[1:3], tokens))

    schema = f"{arguments.schema} -> ({', '.join(['Tensor'] * len(outputs))})"
    op = torch.library.custom_op(f"maskattn::{operation.name}", mutates_args=(), schema=schema)(run)
    op.register_fake(fake)
    save, differentiate = _backward(operation, arguments)
    op.register_autograd(differentiate, setup_context=save)
    return transformable(op, save, differentiate, _tangent(operation, arguments))


def _backward(operation: Operation, arguments: Arguments) -> tuple[Call, Call]:
    """What keeps the arguments for backward, and backward itself, which runs an op of its own."""
    own = Arguments((operation.gradients, QKV, Outputs, operation.where, operation.options), ("str impl",))
    learnt = [x.name for x in fields(QKV)] + list(differentiable(operation.options))
    positions = [arguments.names.index(name) for name in learnt]
    left = len(fields(Outputs))
    outputs = [x.name for x in fields(operation.outputs)]
    asked_at = [outputs.index(name) for name in operation.asked]
    inputs = len(arguments.declared) - len(asked_at) - 1
    constant = _without_derivative(operation.options, arguments)

    def run(*given: Any) -> tuple[Tensor, ...]:
        grads, qkv, results, where, options, impl = own.grouped(given)
        refuse_missing(impl, options)
        with without_autocast(qkv.q):
            found = operation.backward(implementation(impl))(grads, qkv, results, where, options)
        # An op returns contiguous tensors only, so an absent gradient is one of no elements.
        each = [getattr(found, name) for name in learnt]
        return tuple([qkv.q.new_empty(0) if x is None else x.contiguous() for x in each])

    def fake(*given: Any) -> tuple[Tensor, ...]:
        _, qkv, _, _, options, _ = own.grouped(given)
        inputs = vars(qkv) | vars(options)
        each = (inputs[name] for name in learnt)
        return tuple(qkv.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in each)

    schema = f"{own.schema} -> ({', '.join(['Tensor'] * len(learnt))})"
    op = torch.library.custom_op(f"maskattn::{operation.name}_backward", mutates_args=(), schema=schema)(run)
    op.register_fake(fake)
    reason = no_second_derivative(operation.name)
    op.register_autograd(reason, setup_context=_save_nothing)
    backward = refuse(op, reason)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        arguments.save(ctx, inputs, *output[:left])

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given, results = arguments.saved(ctx)
        _refuse_derivative(constant, ctx.needs_input_grad)
        grad_out = torch.zeros_like(results[0]) if grads[0] is None else grads[0]
        needed = given[inputs:-1]
        of_asked = [grads[at] if need else None for at, need in zip(asked_at, needed, strict=True)]
        found = backward(grad_out, *of_asked, *given[:3], *results, *given[3:inputs], given[-1])
        returned: list[Tensor | None] = [None] * len(given)
        for position, grad in zip(positions, found, strict=True):
            returned[position] = None if given[position] is None else grad
        return tuple(returned)

    return save, differentiate


def _tangent(operation: Operation, arguments: Arguments) -> Call:
    """The tangents of the outputs, called with those of the arguments."""
    own = Arguments((QKV, operation.where, operation.options, Tangents))
    positions = [arguments.names.index(x.name) for x in fields(Tangents)]
    constant = _without_derivative(operation.options, arguments)

    def run(*given: Any) -> tuple[Tensor, ...]:
        return operation.tangent(*own.grouped(given))

    # An operation of its own, so that torch.func maps over it.
    tangent = refuse(run, no_second_derivative(operation.name), always=True)

    def push(ctx: Any, *moved: Tensor | None) -> tuple[Tensor, ...]:
        given, (_, lse, lse_rest) = arguments.saved(ctx)
        _refuse_derivative(constant, [x is not None for x in moved])
        inputs, (*needed, _) = given[: -len(operation.asked) - 1], given[-len(operation.asked) - 1 :]
        out_moved, lse_moved, *rows_moved = tangent(*inputs, *(moved[i] for i in positions))
        # In the dtype of lse, which has no elements where it was not asked for.
        lse_moved = lse_moved.to(lse.dtype) if lse_moved.shape == lse.shape else torch.zeros_like(lse)
        rows_moved = [x if needed[-1] else x[..., :0].contiguous() for x in rows_moved]
        return out_moved, lse_moved, torch.zeros_like(lse_rest), *rows_moved

    return push


def register_without_derivative(
    name: str, groups: tuple[type, ...], run: Callable[..., Tensor], shape: Call, reason: str
) -> Call:
    """Register an operation that returns one tensor and has no derivative.

    Args:
        name: of the op.
        groups: the dataclasses that ``run`` is given, QKV first, without the options.
        run: called as run(implementation's name, *groups, options).
        shape: called as shape(*groups), the shape of the result.
        reason: what asking for the derivative raises.
    """
    arguments = Arguments((*groups, Options), ("str impl",))

    def body(*given: Any) -> Tensor:
        *inputs, options, impl = arguments.grouped(given)
        _refuse_foreign(name, options)
        refuse_missing(impl, options)
        with without_autocast(inputs[0].q):
            return run(impl, *inputs, options).contiguous()

    def fake(*given: Any) -> Tensor:
        *inputs, _, impl = arguments.grouped(given)
        q = inputs[0].q
        return q.new_empty(shape(*inputs), dtype=_sum_dtype(q, impl))

    def refuse_it(*_: Any) -> Any:
        raise NotImplementedError(reason)

    op = torch.library.custom_op(f"maskattn::{name}", mutates_args=(), schema=f"{arguments.schema} -> Tensor")(body)
    op.register_fake(fake)
    return refuse(op, refuse_it)


def flat_options(options: Options) -> Collection[Any]:
    """The options as the ops take them."""
    return flat(options)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside an op dtypes are what the caller chose; autocast would turn float32 sums into halves."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if is_autocast(kind) else _NO_CONTEXT


def is_autocast(kind: str) -> bool:
    """Whether ``torch.autocast`` is on for a device type; there are some, like meta, that it does not know."""
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def no_second_derivative(name: str) -> Call:
    """What a derivative's own derivative is: a refusal that says what to do instead."""

    def raise_it(*_: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no second derivative (a backward with create_graph=True, or a transform of torch.func, was "
            "differentiated); use the functions of maskattn.attention.reference, which torch differentiates any "
            "number of times"
        )

    return raise_it


def _without_derivative(kind: type[Options], arguments: Arguments) -> list[tuple[int, str]]:
    """Position and name of the options that are tensors of numbers without a derivative, such as coordinates."""
    tensors = {arguments.names[i]: i for i in arguments.tensors}
    constant = [x for x in fields(kind) if x.name in tensors and not x.metadata.get("differentiable")]
    return [(tensors[x.name], x.metadata.get("named") or x.name) for x in constant]


def _refuse_derivative(of: list[tuple[int, str]], asked: Sequence[bool]) -> None:
    for position, name in of:
        if asked[position]:
            raise NotImplementedError(
                f"{name} {'have' if name.endswith('s') else 'has'} no derivative, got one asked for by torch.func or "
                "forward-mode AD; compute them from what has none, or use the functions of "
                "maskattn.attention.reference"
            )


def _refuse_foreign(operation: str, options: Options) -> None:
    """Raise where the options say more than the operation can take."""
    for x in fields(options):
        if operation not in x.metadata.get("operations", (operation,)) and is_given(
            getattr(options, x.name), x.default
        ):
            name = x.metadata.get("named") or x.name
            raise ValueError(f"{operation} has no {name}, got {x.name}={getattr(options, x.name)}; leave it out")


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing is needed to refuse."""


def _sum_dtype(q: Tensor, impl: str) -> torch.dtype:
    """float32 or wider, but the specification computes in q's own dtype."""
    return q.dtype if impl == "reference" else torch.promote_types(q.dtype, torch.float32)
