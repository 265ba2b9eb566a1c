"""Functions and modules that ``torch.fx`` records as one node, like torch's own.

A symbolic trace has neither shapes nor masks to read, so the inside of a layer or an operation cannot be traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

__all__ = ["leaf_function", "leaf_module"]

Function = TypeVar("Function", bound=Callable[..., Any])


def leaf_function(function: Function) -> Function:
    """Wrap a function so that it records a node that calls it if an argument is a proxy of ``torch.fx``."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        proxy = torch.fx.Proxy
        for argument in (*arguments, *options.values()):
            if isinstance(argument, proxy):
                return argument.tracer.create_proxy("call_function", call, arguments, options)
        return function(*arguments, **options)

    return cast(Function, call)


def leaf_module(module: nn.Module, first: torch.fx.Proxy, *rest: Any) -> Any:
    """Record a node that calls the module with these arguments.

    Raises:
        TypeError: the module is the root of the trace, which a node cannot represent.
    """
    tracer = cast(torch.fx.Tracer, first.tracer)
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"torch.fx records a {type(module).__name__} as one node of a larger model, got it as the root; use "
            "forward hooks, or torch.export"
        )
    return tracer.create_proxy("call_module", path, (first, *rest), {})
