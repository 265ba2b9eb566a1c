"""Registration of operations with ``torch.library``, so that programs that compile nothing do not pay for it.

``torch.library.custom_op`` wraps every kernel so that ``torch.compile`` does not trace it, and imports the compiler for
that at the first call: about a second. The kernels registered here do the same only once the compiler has been
imported. A call that nothing observes, neither a trace nor a mode, goes straight to its kernel, with a gradient by an
autograd function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch.autograd.function import Function
from torch.library import Library

__all__ = [
    "constant_in_traces",
    "define",
    "is_shortened",
    "is_unobserved",
    "learnt_positions",
    "library",
    "short_cut",
    "untraced",
]

Call = Callable[..., Any]
CallT = TypeVar("CallT", bound=Callable[..., Any])

# Kernels of a device take precedence over torch's wrapper, which stays for all other devices.
_DEVICES = ("CPU", "CUDA")
library = Library("maskattn", "FRAGMENT")

# What every thread adds to the keys by which torch dispatches. Modes, traces and transforms add keys of their own.
_USUAL_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView)
_USUAL = (_USUAL_KEYS.raw_repr(), _USUAL_KEYS.remove(torch._C.DispatchKey.ADInplaceOrView).raw_repr())

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


def define(name: str, schema: str, body: Call, fake: Call) -> CustomOpDef:
    """Define the operation ``maskattn::<name>``, which returns new tensors and changes none.

    Args:
        name: the name of the operation.
        schema: the arguments and results in the syntax of ``torch.library``.
        body: the kernel, called with tensors of any device.
        fake: called with tensors without values; returns empty results of the right shapes.
    """
    operation = torch.library.custom_op(f"maskattn::{name}", mutates_args=(), schema=schema)(body)
    operation.register_fake(fake)
    for device in _DEVICES:
        library.impl(name, untraced(body), device)
    return operation


def untraced(body: Call) -> Call:
    """Wrap a kernel so that ``torch.compile`` does not trace it, without importing the compiler."""
    if_compiled: list[Call] = []

    def kernel(*args: Any) -> Any:
        if not _may_be_traced():
            return body(*args)
        if not if_compiled:
            if_compiled.append(torch.compiler.disable(body))
        return if_compiled[0](*args)

    return kernel


def _may_be_traced() -> bool:
    """Return whether the compiler would trace a function that is called now."""
    if "torch._dynamo" not in sys.modules:
        return False
    # The callback says nothing to the compiler that is tracing this.
    return torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def constant_in_traces(function: CallT) -> CallT:
    """Mark a function whose result ``torch.compile`` takes for a constant instead of tracing it.

    ``torch.compiler.assume_constant_result`` does the same, but imports the entire compiler, which takes as long as
    importing torch.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010 (a name that mypy does not know)
    return function


def short_cut(
    operation: CustomOpDef, save: Call | None = None, backward: Call | None = None, is_alone: Call | None = None
) -> Call:
    """Return the operation, which then calls its kernel directly where torch's dispatcher would only pass the call on.

    That saves tens of microseconds, and with a gradient hundreds. Torch sees every other call: under ``torch.compile``,
    ``torch.export``, ``torch.func``, a mode, the profiler or ``torch.jit.trace``, and with other than plain tensors of
    a device that has a kernel; with a gradient also those of an operation without ``save`` and ``backward``.

    Args:
        operation: the operation.
        save, backward: as for ``torch.library.register_autograd``: save(ctx, inputs, output) and backward(ctx, *grads).
        is_alone: called with the arguments; returns whether the first result alone has a gradient. The others then are
            no part of the graph, and backward gets one gradient. None: all results have one.
    """
    kernel = untraced(operation._init_fn)
    types = [str(x.type) for x in operation._opoverload._schema.arguments]
    positions = tuple(i for i, kind in enumerate(types) if kind.endswith("Tensor") or kind == "Optional[Tensor]")
    tensors_of = _chosen(positions)
    recorded = save and backward and _recorded(operation._name, kernel, save, backward, is_alone)

    def call(*args: Any) -> Any:
        # The compiler cannot trace the choice of the tensors.
        if torch.compiler.is_compiling() or not is_unobserved(tensors := tensors_of(args)):
            return operation(*args)
        if not torch.is_grad_enabled():
            return kernel(*args)
        learnt = [i for i, x in zip(positions, tensors) if x is not None and x.requires_grad]  # noqa: B905 (slower)
        if not learnt:
            return kernel(*args)
        return operation(*args) if recorded is None else recorded(args, learnt)

    return call


def _chosen(positions: tuple[int, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return a function that selects the arguments at these positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda args: tuple([args[i] for i in positions])


def _recorded(name: str, kernel: Call, save: Call, backward: Call, is_alone: Call | None) -> Call:
    """Return a function of the arguments and the positions of those that learn: the kernel as an autograd function.

    Torch takes an autograd function's arguments and results apart one by one, so that it gets only those that learn.
    """

    def forward(ctx: Any, args: tuple[Any, ...], learnt: list[int], unseen: list[Any], *_: Tensor) -> Any:
        output = kernel(*args)
        ctx.learnt = learnt
        save(ctx, args, output)
        if is_alone is None or not is_alone(args):
            return output
        first, *unseen[:] = output
        return first

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = backward(ctx, *grads)
        return (None, None, None, *[found[i] for i in ctx.learnt])

    members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    # The C++ part of torch's ``apply``: no transform is active here, for which the rest looks through the arguments.
    apply = super(Function, type(name, (Function,), members)).apply  # type: ignore[misc]  # of a class made here

    def call(args: tuple[Any, ...], learnt: list[int]) -> Any:
        unseen: list[Any] = []
        seen = apply(args, learnt, unseen, *[args[i] for i in learnt])
        return (seen, *unseen) if unseen else seen

    return call


def is_shortened(ctx: Any) -> bool:
    """Return whether a backward belongs to a call by a short cut."""
    return hasattr(ctx, "learnt")


def learnt_positions(ctx: Any) -> Sequence[int]:
    """Return the positions of the arguments whose gradients a backward is asked for, also of one called by a short
    cut."""
    found: Sequence[int] | None = getattr(ctx, "learnt", None)
    return [i for i, needed in enumerate(ctx.needs_input_grad) if needed] if found is None else found


def is_unobserved(tensors: tuple[Tensor | None, ...], known: tuple[Tensor | None, ...] = ()) -> bool:
    """Return whether no trace, mode or profiler sees a call with these tensors, and all are plain ones.

    Args:
        tensors: tensors of the call.
        known: more of them, which were plain ones in an earlier call and may have been replaced by a hook since.
    """
    if torch.compiler.is_compiling() or torch._C._dispatch_tls_local_include_set().raw_repr() not in _USUAL:
        return False
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]  # torch's stubs leave it out
    if profiled or torch._C._len_torch_function_stack():
        return False
    if not (_PLAIN.issuperset(map(type, tensors)) and _PLAIN.issuperset(map(type, known))):
        return False
    for x in tensors:  # noqa: SIM110 (a generator takes longer)
        if x is not None and (x.is_neg() or not (x.is_cpu or x.is_cuda)):
            return False
    return True
