"""What an implementation of an attention operation is given; ``results.py`` has what it gives back.

Each is a frozen dataclass, so that an operation has a handful of arguments. The arguments of the registered ops are the
fields of these and of :class:`~maskattn.options.Options`, in order. On the lowest floor, because the kernels take them.

Dimension key: B sequences, N grid tokens (Nq of the queries), Tq and Tk packed query and key tokens, R readout queries,
H heads, D head width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskattn.shapes import Bool, Float, Int

__all__ = ["QKV", "ClassGradients", "KeySequences", "Mask", "Origins", "Sequences"]


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
