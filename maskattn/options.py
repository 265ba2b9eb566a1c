"""What is handed to every implementation of an attention operation, besides the queries, keys and values.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskattn.shapes import Float, Int

__all__ = ["Gradients", "Options", "Sequences", "empty_rest", "keeps_rest"]


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of packed queries and keys lie.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, the first row of each sequence, ending with Tq or Tk.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
    """

    cu_seqlens_q: Int[Tensor, "B_plus_1"]
    cu_seqlens_k: Int[Tensor, "B_plus_1"]
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Options:
    """How scores are made of q·k, and which weights are dropped.

    Attributes:
        scale: multiplies q·k.
        key_bias: added to the scores of its key: (Tk,) or (Tk, H); of dense tensors (B, N) or (B, H, N).
        slopes: (H,), the heads' slopes of two-dimensional ALiBi; None for none.
        coords_q, coords_k: places of the tokens, given with ``slopes``: (Tq, 2) and (Tk, 2), of dense tensors
            (B, Nq, 2) and (B, N, 2), of a readout's queries (B, R, 2). A row of NaN is a token without a place (class
            token, register), at distance 0 from all.
        dropout_p: share of the weights that count as 0, in [0, 1); the others are divided by 1 − dropout_p.
        dropout_seed: (1,) int64 on q's device, given with ``dropout_p`` > 0; see ``maskattn.attention.dropout``.
    """

    scale: float
    key_bias: Float[Tensor, "..."] | None = None
    slopes: Float[Tensor, "H"] | None = None
    coords_q: Float[Tensor, "... 2"] | None = None
    coords_k: Float[Tensor, "... 2"] | None = None
    dropout_p: float = 0.0
    dropout_seed: Int[Tensor, "1"] | None = None


@dataclass(frozen=True)
class Gradients:
    """Gradients of an operation's inputs, shaped as these are; None for what was not given."""

    q: Float[Tensor, "..."]
    k: Float[Tensor, "..."]
    v: Float[Tensor, "..."]
    key_bias: Float[Tensor, "..."] | None = None
    slopes: Float[Tensor, "H"] | None = None


def keeps_rest(impl: str, options: Options) -> bool:
    """Whether an implementation leaves its backward more of lse than a float32 holds.

    Scores may be large where something is added to them. lse does not tell then how many keys share the largest score,
    and weights made of it alone would be off by a factor of the row; what rounding took from lse, its *rest*, does.
    """
    if impl not in ("cpu", "triton"):
        return False
    return options.key_bias is not None or (impl == "cpu" and options.slopes is not None)


def empty_rest(lse: Tensor, impl: str, options: Options) -> Tensor:
    """Room for what an implementation keeps of lse, shaped as that; one axis of no elements where it keeps nothing."""
    return lse.new_empty(lse.shape if keeps_rest(impl, options) else 0)
