"""The token-wise half of a block: plain and gated MLPs, with timm's class and parameter names.

Dimension key: C channels, F hidden features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """``fc2(norm(act(fc1(x))))``.

    Args:
        dim: C.
        hidden: F.
        act: a key of :data:`ACTIVATIONS`.
        bias: of both layers.
        norm_eps: of a norm before fc2; None: no such norm.
        drop: share of features dropped after the activation and after fc2, in training.
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
        """(..., C) → (..., C)."""
        hidden = self.drop(ACTIVATIONS[self.act](self.fc1(x)))
        return self.drop(self.fc2(self.norm(hidden)))


class SwiGLUPacked(nn.Module):
    """``fc2(norm(act(gate) · value))`` with gate and value the two halves of ``fc1(x)``; ``hidden`` counts both."""

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
                f"a packed SwiGLU halves its hidden features, got {hidden}; choose mlp_ratio so that they are even"
            )
        self.act = act
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden // 2, eps=norm_eps)
        self.fc2 = nn.Linear(hidden // 2, dim, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., C)."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        hidden = self.drop(ACTIVATIONS[self.act](gate) * value)
        return self.drop(self.fc2(self.norm(hidden)))


class SwiGLU(nn.Module):
    """``fc2(norm(act(fc1_g(x)) · fc1_x(x)))``: gate and value in layers of their own."""

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
        """(..., C) → (..., C)."""
        hidden = self.drop(ACTIVATIONS[self.act](self.fc1_g(x)) * self.fc1_x(x))
        return self.drop(self.fc2(self.norm(hidden)))


MLPS: dict[str, type[Mlp] | type[SwiGLUPacked] | type[SwiGLU]] = {
    "mlp": Mlp,
    "swiglu_packed": SwiGLUPacked,
    "swiglu": SwiGLU,
}
