"""The outputs of an implementation of an attention operation, and the gradients and tangents of outputs and inputs.

They are grouped into frozen dataclasses, like the inputs in ``operands.py``.

Dimension key: B sequences, Nq queries of dense tensors, Tq packed queries, T packed tokens, R readout queries, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskattn.shapes import Float

__all__ = ["Gradients", "OutputGradients", "Outputs", "ReadoutGradients", "ReadoutOutputs", "Tangents"]


@dataclass(frozen=True)
class Outputs:
    """The results of forward, some of which backward needs.

    Attributes:
        out: the output, of q's shape and dtype; 0 for a query without keys.
        lse: the log-sum-exp of each query's scores, −inf for a query without keys, in float32 (float64 for float64):
            (H, Tq), (B, H, Nq), or (B, R, H) for a readout.
        lse_rest: the rounding error of lse, of the same shape and dtype, for calls with an option in the
            implementation's ``WITH_REST``; otherwise a tensor without elements.
    """

    out: Float[Tensor, "..."]
    lse: Float[Tensor, "..."]
    lse_rest: Float[Tensor, "..."]


@dataclass(frozen=True)
class ReadoutOutputs(Outputs):
    """The results of a readout; ``rows`` (R, H, T) are the softmax weights before dropout, (R, H, 0) if unwanted."""

    rows: Float[Tensor, "R H T"]


@dataclass(frozen=True)
class OutputGradients:
    """Gradients of the results of forward, of the shapes in :class:`Outputs`; None stands for zeros."""

    grad_out: Float[Tensor, "..."]
    grad_lse: Float[Tensor, "..."] | None


@dataclass(frozen=True)
class ReadoutGradients(OutputGradients):
    """Gradients of the results of a readout: also of the attention rows (R, H, T); None stands for zeros."""

    grad_rows: Float[Tensor, "R H T"] | None


@dataclass(frozen=True)
class Gradients:
    """Gradients of an operation's inputs, of the inputs' shapes; None for inputs that were not given.

    The fields after q, k and v are the differentiable fields of :class:`~maskattn.options.Options`.
    """

    q: Float[Tensor, "..."]
    k: Float[Tensor, "..."]
    v: Float[Tensor, "..."]
    key_bias: Float[Tensor, "..."] | None = None
    slopes: Float[Tensor, "H"] | None = None


@dataclass(frozen=True)
class Tangents:
    """Tangents of an operation's inputs, with the fields of :class:`Gradients`; None stands for zeros."""

    q: Float[Tensor, "..."] | None = None
    k: Float[Tensor, "..."] | None = None
    v: Float[Tensor, "..."] | None = None
    key_bias: Float[Tensor, "..."] | None = None
    slopes: Float[Tensor, "H"] | None = None
