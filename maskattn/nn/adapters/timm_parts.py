"""Parts of timm's models by our names."""

from __future__ import annotations

from typing import Any

__all__ = ["activation_of", "mlp_layer_of"]

_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu", "SiLU": "silu"}


def activation_of(mlp: Any) -> str | None:
    """The activation of a timm MLP as ours names it; None if ours has it not."""
    name = _ACTIVATIONS.get(type(mlp.act).__name__)
    return "gelu_tanh" if name == "gelu" and getattr(mlp.act, "approximate", "none") == "tanh" else name


def mlp_layer_of(mlp: Any) -> str | None:
    """The kind of a timm MLP as ours names it; None if ours has it not."""
    from timm.layers import GluMlp, Mlp, SwiGLU

    if type(mlp) is Mlp:
        return "mlp"
    if type(mlp) is GluMlp and not mlp.gate_last:
        return "swiglu_packed"
    return "swiglu" if type(mlp) is SwiGLU else None
