"""The MLP of a block, plain and gated, with timm's class and parameter names.

Dimension key: C channels, F hidden features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.nn.inference_linear import linear, linear_and_activation

__all__ = ["ACTIVATIONS", "MLPS", "Mlp", "SwiGLU", "SwiGLUPacked"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """A two-layer MLP: ``fc2(norm(act(fc1(x))))``.

    Args:
        dim: C.
        hidden: F.
        act: a key of :data:`ACTIVATIONS`.
        bias: whether both layers have biases.
        norm_eps: ε of the norm before fc2; None leaves the norm out.
        drop: the share of features dropped after the activation and after fc2, in training.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        act: str = "gelu",
        bias: bool = True,
        norm_eps: float | None = None,
        drop: float = 0,
    ) -> None:
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers, (..., C) → (..., C)."""
        hidden = self.drop(linear_and_activation(self.fc1, x, self.act, ACTIVATIONS[self.act]))
        return self.drop(linear(self.fc2, self.norm(hidden)))


class SwiGLUPacked(nn.Module):
    """A gated MLP whose ``fc1`` gives gate and value: ``fc2(norm(act(gate) · value))``; ``hidden`` counts both."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        act: str = "silu",
        bias: bool = True,
        norm_eps: float | None = None,
        drop: float = 0,
    ) -> None:
        super().__init__()
        if hidden % 2:
            raise ValueError(
                f"a packed SwiGLU needs an even number of hidden features, got {hidden}; choose mlp_ratio accordingly"
            )
        self.act = act
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden // 2, eps=norm_eps)
        self.fc2 = nn.Linear(hidden // 2, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers, (..., C) → (..., C)."""
        gate, value = linear(self.fc1, x).chunk(2, dim=-1)
        hidden = self.drop(ACTIVATIONS[self.act](gate) * value)
        return self.drop(linear(self.fc2, self.norm(hidden)))


class SwiGLU(nn.Module):
    """A gated MLP with separate layers for gate and value: ``fc2(norm(act(fc1_g(x)) · fc1_x(x)))``."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        act: str = "silu",
        bias: bool = True,
        norm_eps: float | None = None,
        drop: float = 0,
    ) -> None:
        super().__init__()
        self.act = act
        self.fc1_g = nn.Linear(dim, hidden, bias=bias)
        self.fc1_x = nn.Linear(dim, hidden, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers, (..., C) → (..., C)."""
        hidden = self.drop(ACTIVATIONS[self.act](linear(self.fc1_g, x)) * linear(self.fc1_x, x))
        return self.drop(linear(self.fc2, self.norm(hidden)))


MLPS: dict[str, type[Mlp] | type[SwiGLUPacked] | type[SwiGLU]] = {
    "mlp": Mlp,
    "swiglu_packed": SwiGLUPacked,
    "swiglu": SwiGLU,
}
