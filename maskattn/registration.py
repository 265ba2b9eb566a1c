"""Registration of operations with ``torch.library``, so that the first call does not import torch's compiler.

``torch.library.custom_op`` wraps every kernel so that ``torch.compile`` does not trace it, and imports the compiler for
that at the first call: about a second, also in programs that compile nothing. The kernels registered here do the same
only once the compiler has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch.library import Library

__all__ = ["define", "library", "untraced"]

Call = Callable[..., Any]

# Kernels of a device take precedence over torch's wrapper, which stays for all other devices.
_DEVICES = ("CPU", "CUDA")
library = Library("maskattn", "FRAGMENT")


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
