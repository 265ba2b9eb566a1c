"""Whether weights are those of a network: what is missing, what has no place, what has another shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["joined", "misfits"]


def misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """A clause for each key that does not fit; none where all do.

    Args:
        state: the weights.
        expected: the network's own state dict.
    """
    wrong = [f"it has no {key}" for key in sorted(expected.keys() - state.keys())]
    wrong += [f"{key} has no place" for key in sorted(state.keys() - expected.keys())]
    return wrong + [
        f"{key} is {tuple(x.shape)} instead of {tuple(expected[key].shape)}"
        for key, x in state.items()
        if key in expected and x.shape != expected[key].shape
    ]


def joined(clauses: Sequence[str], most: int = 6) -> str:
    """The first of some clauses, and how many more there are."""
    return "; ".join(clauses[:most]) + (f"; and {len(clauses) - most} more" if len(clauses) > most else "")
