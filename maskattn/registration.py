"""Registration of operations with ``torch.library``, so that programs that compile nothing do not pay for it.

``torch.library.custom_op`` wraps every kernel so that ``torch.compile`` does not trace it, and imports the compiler for
that at the first call: about a second. The kernels registered here do the same only once the compiler has been
imported. A call that nothing observes, neither autograd nor a trace nor a mode, goes straight to its kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch.library import Library

__all__ = ["define", "library", "short_cut", "untraced"]

Call = Callable[..., Any]

# Kernels of a device take precedence over torch's wrapper, which stays for all other devices.
_DEVICES = ("CPU", "CUDA")
library = Library("maskattn", "FRAGMENT")

# What every thread adds to the keys by which torch dispatches. Modes, traces and transforms add keys of their own.
_USUAL_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView)
_USUAL = (_USUAL_KEYS.raw_repr(), _USUAL_KEYS.remove(torch._C.DispatchKey.ADInplaceOrView).raw_repr())


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
        if "torch._dynamo" not in sys.modules:
            return body(*args)
        if not if_compiled:
            if_compiled.append(torch.compiler.disable(body))
        return if_compiled[0](*args)

    return kernel


def short_cut(operation: CustomOpDef) -> Call:
    """Return the operation, which then calls its kernel directly where torch's dispatcher would only pass the call on.

    That saves tens of microseconds. Torch sees every other call: with a gradient to record, under ``torch.compile``,
    ``torch.export``, ``torch.func``, a mode, the profiler or ``torch.jit.trace``, and with other than plain tensors of
    a device that has a kernel.
    """
    kernel = untraced(operation._init_fn)

    def call(*args: Any) -> Any:
        return kernel(*args) if _is_unobserved(args) else operation(*args)

    return call


def _is_unobserved(args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or torch._C._dispatch_tls_local_include_set().raw_repr() not in _USUAL:
        return False
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]  # torch's stubs leave it out
    if profiled or torch._C._len_torch_function_stack():
        return False
    grad = torch.is_grad_enabled()
    for x in args:
        if isinstance(x, Tensor) and (
            (type(x) is not Tensor and type(x) is not nn.Parameter)
            or (grad and x.requires_grad)
            or x.is_neg()
            or not (x.is_cpu or x.is_cuda)
        ):
            return False
    return True
