"""Registration of the attention operations with torch: ``torch.library`` schemas, fake kernels and autograd.

:func:`register` registers an :class:`Operation`, which describes how it differs from the others; everything else
follows from the fields of the dataclasses that an implementation takes. The implementation's name is an argument of
the op. The backward is a separate op, so that both are opaque to ``torch.compile``; its own derivative is refused.
``maskattn.transforms`` adds support for ``torch.func`` and forward-mode AD.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads, D head
width, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import Field, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from maskattn.attention.implementation import Implementation, implementation, keeps_rest, refuse_missing
from maskattn.attention.schema import Arguments, flat
from maskattn.operands import QKV
from maskattn.options import Options, differentiable, is_given
from maskattn.registration import define, is_shortened, learnt_positions, untraced
from maskattn.results import Gradients, OutputGradients, Outputs, Tangents
from maskattn.transforms import passes_by, refuse, transformable

__all__ = ["Operation", "flat_options", "is_autocast", "register", "register_without_derivative", "without_autocast"]

Call = Callable[..., Any]

_NO_CONTEXT = nullcontext()


@dataclass(frozen=True)
class Operation:
    """The properties in which an operation differs from the others.

    Attributes:
        name: the name of the op, in the name of its backward and in error messages.
        where: the dataclass that defines which queries see which keys.
        asked: the optional outputs besides ``out``; each has an argument ``need_…``.
        outputs: the dataclass that forward returns.
        gradients: the dataclass of gradients that backward takes.
        forward, backward: select the implementation's functions.
        tangent: called as tangent(qkv, where, options, tangents); returns the tangents of ``out`` and of the optional
            outputs.
        lse_shape: q → the shape of lse.
        check: called as check(qkv, where); raises if values that only the op can read are invalid.
        options: the dataclass of the options.
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
        # Checked inside the op, where tensors have values under torch.compile and transforms, too.
        operation.check(qkv, where)
        _refuse_foreign(operation.name, options)
        refuse_missing(impl, options)
        with without_autocast(qkv.q):
            results = operation.forward(implementation(impl))(qkv, where, options, *asked)
        return tuple([x.contiguous() for x in flat(results)])

    def fake(*given: Any) -> tuple[Tensor, ...]:
        qkv, _, options, *asked, impl = arguments.grouped(given)
        # For impl "torch" lse costs extra, so it is omitted unless an optional output needs it.
        shape = operation.lse_shape(qkv.q)
        shape = shape if any(asked) or impl != "torch" else (*shape[:-1], 0)
        lse = qkv.q.new_empty(shape, dtype=_sum_dtype(qkv.q, impl))
        results = qkv.q.new_empty(qkv.q.shape), lse, lse.new_empty(lse.shape if keeps_rest(impl, options) else 0)
        if "rows" not in operation.asked:
            return results
        tokens = qkv.k.shape[0] if asked[operation.asked.index("rows")] else 0
        return *results, lse.new_empty((*qkv.q.shape[1:3], tokens))

    schema = f"{arguments.schema} -> ({', '.join(['Tensor'] * len(outputs))})"
    op = define(operation.name, schema, run, fake)
    save, differentiate = _backward(operation, arguments)
    op.register_autograd(differentiate, setup_context=save)
    asked = slice(-1 - len(operation.asked), -1)
    is_alone = functools.partial(_is_unasked, asked)
    return transformable(op, save, differentiate, _tangent(operation, arguments), is_alone=is_alone)


def _is_unasked(asked: slice, given: tuple[Any, ...]) -> bool:
    """Whether none of the optional outputs is asked for, so that ``out`` alone has a gradient."""
    return not any(given[asked])


def _backward(operation: Operation, arguments: Arguments) -> tuple[Call, Call]:
    """The function that saves the arguments for backward, and backward itself, which runs a separate op."""
    own = Arguments((operation.gradients, QKV, Outputs, operation.where, operation.options), ("str impl",))
    learnt = [x.name for x in fields(QKV)] + list(differentiable(operation.options))
    positions = [arguments.names.index(name) for name in learnt]
    left = len(fields(Outputs))
    outputs = [x.name for x in fields(operation.outputs)]
    asked_at = [outputs.index(name) for name in operation.asked]
    inputs = len(arguments.declared) - len(asked_at) - 1
    constant = _without_derivative(operation.options, arguments)

    def compute(
        grads: OutputGradients, qkv: QKV, results: Outputs, where: Any, options: Options, impl: str
    ) -> list[Tensor | None]:
        refuse_missing(impl, options)
        with without_autocast(qkv.q):
            found = vars(operation.backward(implementation(impl))(grads, qkv, results, where, options))
        return [None if (x := found[name]) is None else x.contiguous() for name in learnt]

    def run(*given: Any) -> tuple[Tensor, ...]:
        # An op can only return tensors, so an absent gradient is a tensor without elements.
        return tuple([given[0].new_empty(0) if x is None else x for x in compute(*own.grouped(given))])

    def fake(*given: Any) -> tuple[Tensor, ...]:
        _, qkv, _, _, options, _ = own.grouped(given)
        inputs = vars(qkv) | vars(options)
        each = (inputs[name] for name in learnt)
        return tuple(qkv.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in each)

    schema = f"{own.schema} -> ({', '.join(['Tensor'] * len(learnt))})"
    op = define(f"{operation.name}_backward", schema, run, fake)
    reason = no_second_derivative(operation.name)
    op.register_autograd(reason, setup_context=_save_nothing)
    backward, direct = refuse(op, reason), untraced(compute)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        arguments.save(ctx, inputs, *output[:left])

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        given, results = arguments.restored(tensors, ctx.constants)
        _refuse_derivative(constant, learnt_positions(ctx))
        grad_out = torch.zeros_like(results[0]) if grads[0] is None else grads[0]
        needed = given[inputs:-1]
        of_asked = [grads[at] if need else None for at, need in zip(asked_at, needed, strict=True)]
        new: tuple[Any, ...] = grad_out, *of_asked
        # Tensors that a short cut saved were plain ones.
        if passes_by(new, tensors) if is_shortened(ctx) else passes_by((*new, *tensors)):
            qkv, where, options, *_, impl = arguments.grouped(given)
            found = direct(operation.gradients(*new), qkv, Outputs(*results), where, options, impl)
        else:
            found = backward(*new, *given[:3], *results, *given[3:inputs], given[-1])
        returned: list[Tensor | None] = [None] * len(given)
        for position, grad in zip(positions, found, strict=True):
            returned[position] = None if given[position] is None else grad
        return tuple(returned)

    return save, differentiate


def _tangent(operation: Operation, arguments: Arguments) -> Call:
    """The function from the tangents of the arguments to those of the outputs."""
    own = Arguments((QKV, operation.where, operation.options, Tangents))
    positions = [arguments.names.index(x.name) for x in fields(Tangents)]
    constant = _without_derivative(operation.options, arguments)

    def run(*given: Any) -> tuple[Tensor, ...]:
        return operation.tangent(*own.grouped(given))

    # Wrapped as a separate operation, so that torch.func can map over it.
    tangent = refuse(run, no_second_derivative(operation.name), always=True)

    def push(ctx: Any, *moved: Tensor | None) -> tuple[Tensor, ...]:
        given, (_, lse, lse_rest) = arguments.saved(ctx)
        _refuse_derivative(constant, [i for i, x in enumerate(moved) if x is not None])
        inputs, (*needed, _) = given[: -len(operation.asked) - 1], given[-len(operation.asked) - 1 :]
        out_moved, lse_moved, *rows_moved = tangent(*inputs, *(moved[i] for i in positions))
        # The tangent needs lse's dtype and shape; lse has no elements if it was not requested.
        lse_moved = lse_moved.to(lse.dtype) if lse_moved.shape == lse.shape else torch.zeros_like(lse)
        rows_moved = [x if needed[-1] else x[..., :0].contiguous() for x in rows_moved]
        return out_moved, lse_moved, torch.zeros_like(lse_rest), *rows_moved

    return push


def register_without_derivative(
    name: str, groups: tuple[type, ...], run: Callable[..., Tensor], shape: Call, reason: str
) -> Call:
    """Register an operation that returns one tensor and has no derivative.

    Args:
        name: the name of the op.
        groups: the dataclasses that ``run`` takes, QKV first, without the options.
        run: called as run(implementation's name, *groups, options).
        shape: called as shape(*groups); returns the shape of the result.
        reason: the message of the error for a requested derivative.
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

    op = define(name, f"{arguments.schema} -> Tensor", body, fake)
    return refuse(op, refuse_it)


def flat_options(options: Options) -> Collection[Any]:
    """The options as flat arguments of the ops."""
    return flat(options)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, which would change the dtypes inside an op and form sums in half precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if is_autocast(kind) else _NO_CONTEXT


def is_autocast(kind: str) -> bool:
    """Whether ``torch.autocast`` is enabled for a device type; it does not know some types, such as meta."""
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def no_second_derivative(name: str) -> Call:
    """A function that refuses a second derivative and names the alternative."""

    def raise_it(*_: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no second derivative, got one requested (by a backward with create_graph=True, or by nested "
            "transforms of torch.func); use the functions of maskattn.attention.reference, which torch can "
            "differentiate any number of times"
        )

    return raise_it


def _without_derivative(kind: type[Options], arguments: Arguments) -> dict[int, str]:
    """Position and name of the options that are tensors without a derivative, such as coordinates."""
    tensors = {arguments.names[i]: i for i in arguments.tensors}
    constant = [x for x in fields(kind) if x.name in tensors and not x.metadata.get("differentiable")]
    return {tensors[x.name]: x.metadata.get("named") or x.name for x in constant}


def _refuse_derivative(of: dict[int, str], asked: Sequence[int]) -> None:
    for position in asked:
        if position in of:
            name = of[position]
            raise NotImplementedError(
                f"{name} {'have' if name.endswith('s') else 'has'} no derivative, got one requested by torch.func or "
                "forward-mode AD; detach the tensor, or use the functions of maskattn.attention.reference"
            )


def _refuse_foreign(operation: str, options: Options) -> None:
    """Refuse options that the operation does not have."""
    for x in _foreign(operation, type(options)):  # type: ignore[arg-type]  # mypy does not take a class for a hashable
        if is_given(getattr(options, x.name), x.default):
            name = x.metadata.get("named") or x.name
            raise ValueError(f"{operation} has no {name}, got {x.name}={getattr(options, x.name)}; leave it out")


@functools.cache
def _foreign(operation: str, kind: type[Options]) -> tuple[Field[Any], ...]:
    """The options that an operation lacks; one that is registered under a name of its own is taken to have all."""
    known = {name for x in fields(kind) for name in x.metadata.get("operations", ())}
    return tuple(x for x in fields(kind) if operation in known - set(x.metadata.get("operations", known)))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save nothing, because the derivative is refused."""


def _sum_dtype(q: Tensor, impl: str) -> torch.dtype:
    """The dtype of sums: float32 or wider, but q's own for the specification."""
    return q.dtype if impl == "reference" else torch.promote_types(q.dtype, torch.float32)
