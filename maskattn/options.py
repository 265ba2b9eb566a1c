"""The options of the attention operations, in one list that everything else derives from.

The schemas of the registered ops, the tensors saved for backward, the gradients and their order, and the features that
an implementation must support all follow from the fields of :class:`Options`. The module is on the lowest level,
because the kernels import it.

Dimension key: B sequences, N grid tokens, Tq and Tk packed query and key tokens, R readout queries, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from maskattn.shapes import Float, Int

__all__ = ["DIFFERENTIABLE", "RULES", "Options", "Rule", "differentiable", "is_given", "maker", "option"]

ATTENTION = ("packed_attention", "masked_attention", "readout")
EVERYWHERE = (*ATTENTION, "token_relevance")
OF_CHUNKS = ("packed_attention", "readout")


class Rule(NamedTuple):
    """The rule for a value: ``must_be`` in words, the predicate ``holds``, and the ``remedy`` for a violation."""

    must_be: str
    holds: Callable[[Any], bool]
    remedy: str


def option(
    *,
    named: str | None = None,
    differentiable: bool = False,
    operations: tuple[str, ...] = EVERYWHERE,
    rule: Rule | None = None,
) -> dict[str, Any]:
    """Return the metadata of a field of :class:`Options`; the field's default is the value that has no effect.

    Args:
        named: its name in error messages; None for the field's own name.
        differentiable: whether it has a gradient, and thus a field of :class:`~maskattn.results.Gradients` and of
            :class:`~maskattn.results.Tangents`.
        operations: the operations that have the option.
        rule: the rule for an option that is a number or a word.
    """
    return {"named": named, "differentiable": differentiable, "operations": operations, "rule": rule}


_SHARE = Rule("in [0, 1)", lambda x: 0 <= x < 1, "0 drops nothing")
_PRECISION = Rule(
    "'ieee' or 'tf32x3'", lambda x: x in ("ieee", "tf32x3"), "both have float32's error, and 'ieee' asks for nothing"
)


@dataclass(frozen=True)
class Options:
    """The terms of the scores besides q·k, and the dropout of the weights.

    Attributes:
        scale: factor of q·k.
        key_bias: added to the scores of its key: (Tk,) or (Tk, H); for dense tensors (B, N) or (B, H, N).
        slopes: (H,), the heads' slopes of two-dimensional ALiBi; None disables it.
        coords_q, coords_k: positions of the tokens, given with ``slopes``: (Tq, 2) and (Tk, 2), for dense tensors
            (B, Nq, 2) and (B, N, 2), for a readout's queries (B, R, 2). NaN marks a token without a position (class
            token, register), which has distance 0 from all tokens.
        dropout_p: share of the weights that are set to 0, in [0, 1); the others are divided by 1 − dropout_p.
        dropout_seed: (1,) int64 on q's device, given with ``dropout_p`` > 0; see ``maskattn.dropout``.
        precision: how float32 is multiplied: "ieee", or "tf32x3", which also allows three products of TensorFloat-32 in
            place of each. An implementation that multiplies float32 as it is in any case has the option too: what is
            allowed need not be done.
        deterministic: whether the same inputs must give the same bits. False also allows gradients that are summed in
            any order; like a precision, this is an allowance, which an implementation need not take.
        query_offsets, key_offsets: (B,) int32, for sequences that are chunks of longer ones: the positions of each
            chunk's first query and first key in the whole sequence. Only dropout depends on them. None stands for 0.
    """

    scale: float
    key_bias: Float[Tensor, "..."] | None = field(default=None, metadata=option(differentiable=True))
    slopes: Float[Tensor, "H"] | None = field(default=None, metadata=option(differentiable=True))
    coords_q: Float[Tensor, "... 2"] | None = field(default=None, metadata=option(named="coords"))
    coords_k: Float[Tensor, "... 2"] | None = field(default=None, metadata=option(named="coords"))
    dropout_p: float = field(default=0.0, metadata=option(named="dropout", operations=ATTENTION, rule=_SHARE))
    dropout_seed: Int[Tensor, "1"] | None = field(default=None, metadata=option(named="dropout", operations=ATTENTION))
    precision: str = field(default="ieee", metadata=option(operations=ATTENTION[:2], rule=_PRECISION))
    deterministic: bool = field(default=True, metadata=option(operations=ATTENTION[:2]))
    query_offsets: Int[Tensor, "B"] | None = field(default=None, metadata=option(operations=OF_CHUNKS))
    key_offsets: Int[Tensor, "B"] | None = field(default=None, metadata=option(operations=OF_CHUNKS))


RULES: dict[str, Rule] = {x.name: x.metadata["rule"] for x in fields(Options) if x.metadata.get("rule")}


def differentiable(kind: type[Options] = Options) -> tuple[str, ...]:
    """Return the names of the options that have a gradient, in their order."""
    return tuple(x.name for x in fields(kind) if x.metadata.get("differentiable"))


DIFFERENTIABLE = differentiable()

# Largest number of options that a function of :func:`maker` keeps.
MOST_KEPT = 256


def maker(kind: type[Options]) -> Callable[..., Options]:
    """Return a function of the fields that makes options of a kind, once for equal fields without tensors.

    A model's calls have the same options layer after layer, and making them takes longer than finding them.
    """
    made: dict[tuple[Any, ...], Options] = {}

    def make(*values: Any) -> Options:
        try:
            found = made.get(values)
        except TypeError:  # a symbolic number, which has no hash
            return kind(*values)
        if found is None:
            found = kind(*values)
            if len(made) < MOST_KEPT and not any(isinstance(x, Tensor) for x in values):
                made[values] = found
        return found

    return make


def is_given(value: Any, default: Any) -> bool:
    """Return whether an option differs from its default; a tensor always does."""
    return value is not default and (isinstance(value, Tensor) or value != default)
