"""The options of the attention operations: one list, which everything else reads.

The schemas of the registered ops, what is saved for backward, which gradients come back and in which order, and what an
implementation is refused for lacking all follow from the fields of :class:`Options`. It lies on the lowest floor,
because the kernels take it.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from maskattn.operands import Gradients, Sequences
from maskattn.shapes import Float, Int

__all__ = ["Gradients", "Options", "Sequences", "differentiable", "empty_rest", "is_given", "keeps_rest", "option"]

ATTENTION = ("packed_attention", "masked_attention", "readout")
EVERYWHERE = (*ATTENTION, "token_relevance")


def option(
    *, named: str | None = None, differentiable: bool = False, operations: tuple[str, ...] = EVERYWHERE
) -> dict[str, Any]:
    """What there is to know of a field of :class:`Options`; its default is the value with which nothing is asked for.

    Args:
        named: how error messages speak of it; None for the field's own name.
        differentiable: whether it has a gradient, then a field of :class:`~maskattn.operands.Gradients` and of
            ``Tangents`` too.
        operations: the operations that have it.
    """
    return {"named": named, "differentiable": differentiable, "operations": operations}


@dataclass(frozen=True)
class Options:
    """How scores are made of q·k, and which weights are dropped.

    Attributes:
        scale: multiplies q·k.
        key_bias: added to the scores of its key: (Tk,) or (Tk, H); of dense tensors (B, N) or (B, H, N).
        slopes: (H,), the heads' slopes of two-dimensional ALiBi; None for none.
        coords_q, coords_k: positions of the tokens, given with ``slopes``: (Tq, 2) and (Tk, 2), of dense tensors
            (B, Nq, 2) and (B, N, 2), of a readout's queries (B, R, 2). NaN stands for a token without a position (class
            token, register), at distance 0 from all.
        dropout_p: share of the weights that count as 0, in [0, 1); the others are divided by 1 − dropout_p.
        dropout_seed: (1,) int64 on q's device, given with ``dropout_p`` > 0; see ``maskattn.dropout``.
    """

    scale: float
    key_bias: Float[Tensor, "..."] | None = field(default=None, metadata=option(differentiable=True))
    slopes: Float[Tensor, "H"] | None = field(default=None, metadata=option(differentiable=True))
    coords_q: Float[Tensor, "... 2"] | None = field(default=None, metadata=option(named="coords"))
    coords_k: Float[Tensor, "... 2"] | None = field(default=None, metadata=option(named="coords"))
    dropout_p: float = field(default=0.0, metadata=option(named="dropout", operations=ATTENTION))
    dropout_seed: Int[Tensor, "1"] | None = field(default=None, metadata=option(named="dropout", operations=ATTENTION))


def differentiable(kind: type[Options] = Options) -> tuple[str, ...]:
    """Names of the options that have a gradient, in their order."""
    return tuple(x.name for x in fields(kind) if x.metadata.get("differentiable"))


def is_given(value: Any, default: Any) -> bool:
    """Whether an option asks for something: a tensor always does."""
    return value is not default and (isinstance(value, Tensor) or value != default)


# With these options scores may be large, and an implementation leaves its backward more than a float32 of lse.
_WITH_REST = {"cpu": ("key_bias", "slopes"), "triton": ("key_bias",), "gluon": ("key_bias",)}


def keeps_rest(impl: str, options: Options) -> bool:
    """Whether an implementation leaves its backward more of lse than a float32 holds.

    Scores may be large where something is added to them. lse does not tell then how many keys share the largest score,
    and weights made of it alone would be off by a factor for each query; what rounding took from lse, its *rest*, does.
    """
    return any(getattr(options, name) is not None for name in _WITH_REST.get(impl, ()))


def empty_rest(lse: Tensor, impl: str, options: Options) -> Tensor:
    """Room for what an implementation keeps of lse, shaped as that; one axis of no elements where it keeps nothing."""
    return lse.new_empty(lse.shape if keeps_rest(impl, options) else 0)
