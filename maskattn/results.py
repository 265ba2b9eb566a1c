"""What an implementation of an attention operation gives back, and how results and inputs change together.

Each is a frozen dataclass, as those of ``operands.py``.

Dimension key: B sequences, Nq queries of dense tensors, Tq packed queries, T packed tokens, R readout queries, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskattn.shapes import Float

__all__ = ["Gradients", "OutputGradients", "Outputs", "ReadoutGradients", "ReadoutOutputs", "Tangents"]


@dataclass(frozen=True)
class Outputs:
    """What forward returns, and leaves for backward.

    Attributes:
        out: of q's shape and dtype; 0 for a query without keys.
        lse: the log-sum-exp of each query's scores, −inf for a query without keys, in float32 (float64 for float64):
            (H, Tq), (B, H, Nq), or of a readout (B, R, H).
        lse_rest: of lse's shape and dtype, what rounding took from lse, where the implementation's ``WITH_REST`` says
            so; of no elements otherwise.
    """

    out: Float[Tensor, "..."]
    lse: Float[Tensor, "..."]
    lse_rest: Float[Tensor, "..."]


@dataclass(frozen=True)
class ReadoutOutputs(Outputs):
    """With the attention rows (R, H, T), the softmax weights before dropout; (R, H, 0) where not asked for."""

    rows: Float[Tensor, "R H T"]


@dataclass(frozen=True)
class OutputGradients:
    """Gradients of what forward returned, shaped as :class:`Outputs` are; None for zeros."""

    grad_out: Float[Tensor, "..."]
    grad_lse: Float[Tensor, "..."] | None


@dataclass(frozen=True)
class ReadoutGradients(OutputGradients):
    """With the gradient of the attention rows (R, H, T); None for zeros."""

    grad_rows: Float[Tensor, "R H T"] | None


@dataclass(frozen=True)
class Gradients:
    """Gradients of an operation's inputs, shaped as these are; None for what was not given.

    After q, k and v come the differentiable fields of :class:`~maskattn.options.Options`, by their names.
    """

    q: Float[Tensor, "..."]
    k: Float[Tensor, "..."]
    v: Float[Tensor, "..."]
    key_bias: Float[Tensor, "..."] | None = None
    slopes: Float[Tensor, "H"] | None = None


@dataclass(frozen=True)
class Tangents:
    """Tangents of an operation's inputs, with the fields of :class:`Gradients`; None for what does not move."""

    q: Float[Tensor, "..."] | None = None
    k: Float[Tensor, "..."] | None = None
    v: Float[Tensor, "..."] | None = None
    key_bias: Float[Tensor, "..."] | None = None
    slopes: Float[Tensor, "H"] | None = None
