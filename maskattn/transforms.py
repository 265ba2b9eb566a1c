"""Support of registered operations for ``torch.func`` and forward-mode AD: tangent, vmap, or a refusal.

A ``torch.library`` operation supports neither; forward-mode AD would silently give tangents of 0. While one of them is
active, the operation is therefore called as a ``torch.autograd.Function`` that supports both; otherwise, and in traces
of ``torch.compile``, it is called directly. A tangent that reaches the operation itself, called through ``torch.ops``
or in compiled code, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.autograd.function import Function

from maskattn.registration import is_unobserved, library, short_cut

__all__ = ["is_mapped", "is_transformed", "passes_by", "refuse", "take_one_by_one", "transformable"]

Call = Callable[..., Any]

# The keys at which a tangent is still visible. The alias "Autograd" keeps torch's own kernel.
_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta", "AutogradXPU", "AutogradMPS", "AutogradPrivateUse1")


def transformable(
    operation: Call,
    save: Call,
    backward: Call,
    tangent: Call,
    vmap: Call | None = None,
    is_alone: Call | None = None,
) -> Call:
    """Return the operation with support for ``torch.func`` and forward-mode AD.

    Args:
        operation: a function of tensors and constants that returns a tensor or a tuple of tensors.
        save: called as save(ctx, inputs, output), as in ``torch.library.register_autograd``.
        backward: called as backward(ctx, *gradients of the outputs), as in an autograd function.
        tangent: called as tangent(ctx, *tangents of the inputs), with None for inputs without one; returns the tangents
            of the outputs.
        vmap: called as vmap(call, info, in_dims, *inputs), see ``torch.library.register_vmap``; None processes the
            samples one by one.
        is_alone: as for :func:`~maskattn.registration.short_cut`.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    plain = short_cut(operation, save, backward, is_alone) if isinstance(operation, CustomOpDef) else operation
    return _routed(operation, setup_context, backward, tangent, vmap, plain)


def refuse(operation: Call, reason: Call, always: bool = False) -> Call:
    """Return the operation with a derivative that raises.

    Args:
        operation: as in :func:`transformable`.
        reason: a function of any arguments that raises the error.
        always: whether the operation runs as an autograd function outside of transforms, too.
    """

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing, because the derivative is refused."""

    plain = short_cut(operation) if isinstance(operation, CustomOpDef) else operation
    return _routed(operation, save_nothing, reason, reason, None, None if always else plain)


def is_transformed(args: tuple[Any, ...]) -> bool:
    """Return whether a transform of ``torch.func`` is active, or one of the tensors has a tangent."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return _any_tangent(args)


def passes_by(tensors: tuple[Tensor | None, ...], known: tuple[Tensor | None, ...] = ()) -> bool:
    """Return whether torch, called with these tensors, would only pass the call on to an operation's kernel.

    Args:
        tensors, known: as for :func:`~maskattn.registration.is_unobserved`.
    """
    return not torch.is_grad_enabled() and not is_transformed(tensors) and is_unobserved(tensors, known)


def is_mapped(x: Tensor) -> bool:
    """Return whether ``torch.vmap`` maps over the tensor, so that its values cannot be read."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _any_tangent(args: tuple[Any, ...]) -> bool:
    # Without an active level there are no tangents: most calls end here.
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
    )


def _refuse_tangents(operation: CustomOpDef) -> None:
    """Make direct calls of the operation raise for a tensor with a tangent, which torch would silently drop."""
    for key in _AUTOGRAD_KEYS:
        library.impl(operation._qualname.partition("::")[2], _guarded(operation), key, with_keyset=True)


def _guarded(operation: CustomOpDef) -> Call:
    # torch's own kernel. Calling it through the dispatcher would convert all arguments to C++ and back once more.
    run = make_autograd_impl(operation._opoverload, operation)

    def call(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        if _any_tangent(args):
            raise NotImplementedError(
                "an operation called through torch.ops or under torch.compile has no forward-mode derivative, got a "
                f"tangent in {operation._qualname}; call the functions of maskattn without torch.compile"
            )
        return run(keys, *args)

    return call


def _routed(
    operation: Call, setup_context: Call, backward: Call, tangent: Call, vmap: Call | None, plain: Call | None
) -> Call:
    if isinstance(operation, CustomOpDef):
        _refuse_tangents(operation)

    def forward(*args: Any) -> Any:
        return operation(*args)

    def mapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return (vmap or take_one_by_one)(call, info, in_dims, *args)

    members = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "jvp": tangent,
        "vmap": mapped,
    }
    name = getattr(operation, "__name__", type(operation).__name__)
    function = type(name, (Function,), {key: staticmethod(member) for key, member in members.items()})

    def call(*args: Any) -> Any:
        if plain is not None and not is_transformed(args):
            return plain(*args)
        return function.apply(*args)  # type: ignore[attr-defined]

    return call


def take_one_by_one(call: Call, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Implement vmap by one call for each sample."""
    samples = [
        call(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    outputs = tuple(torch.stack(each) for each in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)
