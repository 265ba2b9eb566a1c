"""Whether a module is still what it was built as, so that its weights may be read instead of calling it.

Reading a weight saves work where few of a layer's outputs are needed, and goes round whatever has been put on the layer
since: hooks, parametrisations, adapters, quantisation, sharding. So a caller asks first, on every call.
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
    """The forward of each class, by which one that is patched later is recognised."""
    return {kind: kind.forward for kind in kinds}


def is_plain(module: nn.Module, forwards: Forwards, *, itself: bool = False) -> bool:
    """Whether a module and all that it holds are of known classes, with nothing put on them.

    It is asked on every forward, and so written for speed.

    Args:
        module: the root.
        forwards: the known classes and their forwards; a subclass, as parametrisation and sharding make, is unknown.
        itself: ask of the module alone, not of what it holds.
    """
    if torch_module._has_any_global_hook():
        return False
    waiting = [module]
    for each in waiting:  # which grows
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
    """Whether weight and bias are ordinary tensors: not sharded, not quantised, not offloaded."""
    if torch.compiler.is_exporting():  # where every parameter stands for one
        return True
    parameters = module._parameters
    return type(parameters.get("weight")) in _PLAIN_TENSORS and type(parameters.get("bias")) in _PLAIN_TENSORS
