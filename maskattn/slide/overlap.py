"""Overlapping tiles as several tilings of the slide, each without overlap, shifted by whole tokens.

Tiles that overlap by 1 − 1/n of their side form n² tilings. The model runs on each of them: its tiles do not overlap,
like those that the slide model was trained on, and its map sums to its own score. The mean of the maps therefore sums
to the mean of the scores, and the model processes n² times as many tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskattn.errors import ManifestError

if TYPE_CHECKING:
    from maskattn.slide.request import RunSettings

__all__ = ["check_overlap", "tilings_of"]


def check_overlap(settings: RunSettings) -> None:
    """Refuse an overlap that would have no effect.

    Raises:
        ManifestError: no token maps are requested, which the overlap would average, or features are given, so that no
            tiles are laid.
    """
    if not settings.overlap:
        return
    if not settings.tokens:
        raise ManifestError(
            f"--overlap averages maps of tokens, got --overlap {settings.overlap:g} without --tokens; give it, or "
            "leave the overlap out"
        )
    if settings.features_dir is not None:
        raise ManifestError(
            f"overlapping tiles must be encoded, got --overlap {settings.overlap:g} with --features "
            f"{settings.features_dir}; leave one of them out"
        )


def tilings_of(overlap: float, side: int) -> list[tuple[int, int]]:
    """Return (x, y), the number of tokens by which each tiling starts before the slide's corner; the first is (0, 0).

    Args:
        overlap: the fraction of a tile's side by which tiles overlap.
        side: the number of tokens along a tile.

    Raises:
        ManifestError: the overlap does not shift tiles by whole tokens.

    Example:
        >>> tilings_of(0.5, 8)
        [(0, 0), (4, 0), (0, 4), (4, 4)]
    """
    along = [n for n in range(1, side + 1) if side % n == 0]
    nearest = min(along, key=lambda n: abs(1 - 1 / n - overlap))
    if abs(1 - 1 / nearest - overlap) > 0.005:
        shares = ", ".join(f"{1 - 1 / n:.3g}" for n in along)
        raise ManifestError(
            f"tiles with {side} tokens along a side must be shifted by whole tokens, got --overlap {overlap:g}; use "
            f"one of {shares}"
        )
    starts = range(0, side, side // nearest)
    return [(x, y) for y in starts for x in starts]
