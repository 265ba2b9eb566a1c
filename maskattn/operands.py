"""What an implementation of an attention operation is given, and what it gives back.

Each is a frozen dataclass, so that an operation has a handful of arguments. The arguments of the registered ops are the
fields of these and of :class:`~maskattn.options.Options`, in order. On the lowest floor, because the kernels take them.

Dimension key: B sequences, N grid tokens (Nq of the queries), Tq and Tk packed query and key tokens, R readout queries,
H heads, D head width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskattn.shapes import Bool, Float, Int

__all__ = [
    "QKV",
    "ClassGradients",
    "Gradients",
    "KeySequences",
    "Mask",
    "Origins",
    "OutputGradients",
    "Outputs",
    "ReadoutGradients",
    "ReadoutOutputs",
    "Sequences",
    "Tangents",
]


@dataclass(frozen=True)
class QKV:
    """Queries, keys and values of one dtype and device, with any strides.

    Attributes:
        q: packed (Tq, H, D), dense (B, H, Nq, D), or of a readout (B, R, H, D).
        k, v: packed (Tk, H, D), also of a readout, or dense (B, H, N, D).
    """

    q: Float[Tensor, "..."]
    k: Float[Tensor, "..."]
    v: Float[Tensor, "..."]


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of packed queries and keys begin and end.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, the first token of each sequence, ending with Tq or Tk.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
    """

    cu_seqlens_q: Int[Tensor, "B_plus_1"]
    cu_seqlens_k: Int[Tensor, "B_plus_1"]
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Mask:
    """Which tokens of dense tensors take part.

    Attributes:
        keep: (B, N) bool, True = the token takes part.
        skip_queries: only kept tokens ask, which needs Nq = N; otherwise every query attends to the kept keys.
    """

    keep: Bool[Tensor, "B N"]
    skip_queries: bool


@dataclass(frozen=True)
class KeySequences:
    """Where the sequences of a readout's packed keys begin and end; each has R queries.

    Attributes:
        cu_seqlens: (B + 1,) int32, the first token of each sequence, ending with Tk.
        max_seqlen: no sequence is longer.
    """

    cu_seqlens: Int[Tensor, "B_plus_1"]
    max_seqlen: int


@dataclass(frozen=True)
class ClassGradients:
    """A readout, and the gradient of each class's score with respect to it.

    Attributes:
        out, lse: (B, R, H, D) and (B, R, H), what the readout returned.
        grad_out: (K, B, R, H, D).
    """

    out: Float[Tensor, "B R H D"]
    lse: Float[Tensor, "B R H"]
    grad_out: Float[Tensor, "K B R H D"]


@dataclass(frozen=True)
class Origins:
    """What keys and values are where the tokens they are made of are 0: (H, D) or (T, H, D), None for 0."""

    key_origin: Float[Tensor, "..."] | None = None
    value_origin: Float[Tensor, "..."] | None = None


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
