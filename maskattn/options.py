"""The options of the attention operations: one list, which everything else reads.

The schemas of the registered ops, what is saved for backward, which gradients come back and in which order, and what an
implementation is refused for lacking all follow from the fields of :class:`Options`. It lies on the lowest floor,
because the kernels take it.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from maskattn.shapes import Float, Int

__all__ = ["DIFFERENTIABLE", "RULES", "Options", "Rule", "differentiable", "is_given", "option"]

ATTENTION = ("packed_attention", "masked_attention", "readout")
EVERYWHERE = (*ATTENTION, "token_relevance")


class Rule(NamedTuple):
    """What a number must be: ``must_be`` in words, whether one ``holds``, and the ``remedy`` where it does not."""

    must_be: str
    holds: Callable[[float], bool]
    remedy: str


def option(
    *,
    named: str | None = None,
    differentiable: bool = False,
    operations: tuple[str, ...] = EVERYWHERE,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """What there is to know of a field of :class:`Options`; its default is the value with which nothing is asked for.

    Args:
        named: how error messages speak of it; None for the field's own name.
        differentiable: whether it has a gradient, then a field of :class:`~maskattn.results.Gradients` and of
            ``Tangents`` too.
        operations: the operations that have it.
        rule: of an option that is a number.
    """
    return {"named": named, "differentiable": differentiable, "operations": operations, "rule": rule}


_SHARE = Rule("in [0, 1)", lambda x: 0 <= x < 1, "0 drops nothing")


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
    dropout_p: float = field(default=0.0, metadata=option(named="dropout", operations=ATTENTION, rule=_SHARE))
    dropout_seed: Int[Tensor, "1"] | None = field(default=None, metadata=option(named="dropout", operations=ATTENTION))


RULES: dict[str, Rule] = {x.name: x.metadata["rule"] for x in fields(Options) if x.metadata.get("rule")}


def differentiable(kind: type[Options] = Options) -> tuple[str, ...]:
    """Names of the options that have a gradient, in their order."""
    return tuple(x.name for x in fields(kind) if x.metadata.get("differentiable"))


DIFFERENTIABLE = differentiable()


def is_given(value: Any, default: Any) -> bool:
    """Whether an option asks for something: a tensor always does."""
    return value is not default and (isinstance(value, Tensor) or value != default)
