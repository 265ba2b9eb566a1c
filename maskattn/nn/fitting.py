"""Comparison of a state dict with a network: keys that are missing, unexpected, or of another shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["joined", "misfits"]


def misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return a clause for each key that does not fit; an empty list if all do.

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
    """Join the first ``most`` clauses, and add how many more there are."""
    return "; ".join(clauses[:most]) + (f"; and {len(clauses) - most} more" if len(clauses) > most else "")
