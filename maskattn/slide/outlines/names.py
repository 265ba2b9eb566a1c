"""Suggest known names for one that a user has mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from maskattn.slide.names import shortened

__all__ = ["nearest"]

_MOST_NAMED = 10


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: the known names most similar to it, else the first ten known names.

    Args:
        name: the name as the user gave it.
        known: the known names, at least one.
    """
    folded = {other.casefold(): other for other in reversed(known)}
    close = [folded[other] for other in difflib.get_close_matches(name.casefold(), list(folded), n=3, cutoff=0.6)]
    if close:
        return f"did you mean {' or '.join(repr(shortened(other)) for other in close)}?"
    shown = ", ".join(repr(shortened(other)) for other in known[:_MOST_NAMED])
    return f"there are {shown}" + (f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else "")
