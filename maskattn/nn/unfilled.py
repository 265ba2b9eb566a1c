"""Networks built without initial weights, which loaded ones would replace.

Drawing them at random takes longer than loading: 0.2 s for ViT-S/16, seconds for ViT-L and larger.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["has_unfilled", "unfilled"]

_OF_INIT = (
    "uniform_",
    "normal_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
    "orthogonal_",
    "sparse_",
)
_OF_TENSORS = ("uniform_", "normal_", "log_normal_", "cauchy_", "exponential_", "geometric_", "random_")
_RANDOM = frozenset({getattr(nn.init, name) for name in _OF_INIT} | {getattr(Tensor, name) for name in _OF_TENSORS})
# What libraries make of random numbers in place, such as a truncated normal distribution.
_FURTHER = frozenset(getattr(Tensor, name) for name in ("erfinv_", "mul_", "div_", "add_", "sub_", "clamp_"))


class unfilled(TorchFunctionMode):  # noqa: N801 (a context manager, named as one)
    """Within the context, parameters are not filled at random. Other tensors, and other initial values, are as usual.

    Args:
        mark: fill them with NaN, so that :func:`has_unfilled` finds those that were never loaded; otherwise they hold
            whatever their memory held.
    """

    def __init__(self, mark: bool) -> None:
        super().__init__()
        self._mark = mark
        self._left: dict[int, nn.Parameter] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave a parameter that is to be filled as it is; call any other function."""
        kwargs = kwargs or {}
        if function in _RANDOM or function in _FURTHER:
            tensor = args[0] if args else kwargs.get("tensor")
            if id(tensor) in self._left:
                return tensor
            if function in _RANDOM and isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                self._left[id(tensor)] = tensor
                return self._marked(tensor)
        return function(*args, **kwargs)

    def _marked(self, parameter: nn.Parameter) -> nn.Parameter:
        if self._mark:
            parameter.detach().fill_(torch.nan)
        return parameter


def has_unfilled(network: nn.Module) -> bool:
    """Return whether a parameter of a network built with ``unfilled(mark=True)`` was not loaded."""
    # A sum of parts is NaN if one of them is, and takes no memory.
    return any(bool(x.detach().sum().isnan()) for x in network.parameters() if x.is_floating_point())
