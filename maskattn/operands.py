"""The inputs of an implementation of an attention operation; its outputs are in ``results.py``.

They are grouped into frozen dataclasses, so that an operation has only a few arguments. The arguments of the registered
ops are the fields of these and of :class:`~maskattn.options.Options`, in order. The module is on the lowest level,
because the kernels import it.

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
    """The boundaries of the sequences of packed queries and keys.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, the first token of each sequence, ending with Tq or Tk.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequences' lengths.
    """

    cu_seqlens_q: Int[Tensor, "B_plus_1"]
    cu_seqlens_k: Int[Tensor, "B_plus_1"]
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Mask:
    """The tokens of dense tensors that take part.

    Attributes:
        keep: (B, N) bool, True = the token takes part.
        skip_queries: whether only kept tokens are queries (then Nq = N), or every query attends to the kept keys.
    """

    keep: Bool[Tensor, "B N"]
    skip_queries: bool


@dataclass(frozen=True)
class KeySequences:
    """The boundaries of the sequences of a readout's packed keys; each sequence has R queries.

    Attributes:
        cu_seqlens: (B + 1,) int32, the first token of each sequence, ending with Tk.
        max_seqlen: an upper bound of the sequences' lengths.
    """

    cu_seqlens: Int[Tensor, "B_plus_1"]
    max_seqlen: int


@dataclass(frozen=True)
class ClassGradients:
    """A readout, and the gradient of each class's score with respect to it.

    Attributes:
        out, lse: (B, R, H, D) and (B, R, H), the results of the readout.
        grad_out: (K, B, R, H, D), the gradients.
    """

    out: Float[Tensor, "B R H D"]
    lse: Float[Tensor, "B R H"]
    grad_out: Float[Tensor, "K B R H D"]


@dataclass(frozen=True)
class Origins:
    """The keys and values of tokens of 0: (H, D) or (T, H, D), None for 0."""

    key_origin: Float[Tensor, "..."] | None = None
    value_origin: Float[Tensor, "..."] | None = None
