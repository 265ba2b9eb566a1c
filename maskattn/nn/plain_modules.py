"""Checks that a module is unmodified, so that its weights may be read instead of calling it.

Reading a weight saves work if few of a layer's outputs are needed, but bypasses whatever was attached to the layer
later: hooks, parametrisations, adapters, quantisation, sharding. Callers therefore check on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["forwards_of", "has_plain_parameters", "is_plain"]

_PLAIN_TENSORS = frozenset((nn.Parameter, Tensor, type(None)))

Forwards = Mapping[type[nn.Module], Callable[..., Any]]


def forwards_of(kinds: Iterable[type[nn.Module]]) -> Forwards:
    """Return the forward of each class, from which a class that is patched later is recognised."""
    return {kind: kind.forward for kind in kinds}


def is_plain(module: nn.Module, forwards: Forwards, *, itself: bool = False) -> bool:
    """Return whether a module and its submodules are of known classes and have nothing attached.

    It runs in every forward and is therefore written for speed.

    Args:
        module: the root.
        forwards: the known classes and their forwards; subclasses, as parametrisation and sharding create, are unknown.
        itself: whether to check the module alone, without its submodules.
    """
    if torch_module._has_any_global_hook():
        return False
    waiting = [module]
    for each in waiting:  # the list grows during the loop
        own, kind = each.__dict__, type(each)
        if (
            forwards.get(kind) is not kind.forward
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return False
        if own["_modules"] and not itself:
            waiting.extend(own["_modules"].values())
    return True


def has_plain_parameters(module: nn.Module) -> bool:
    """Return whether weight and bias are ordinary tensors: not sharded, quantised or offloaded."""
    if torch.compiler.is_exporting():  # every parameter is then a fake tensor
        return True
    parameters = module._parameters
    return type(parameters.get("weight")) in _PLAIN_TENSORS and type(parameters.get("bias")) in _PLAIN_TENSORS
