"""How tiles overlap: tilings of the slide, each of tiles side by side, that begin at different tokens of a tile.

Tiles that overlap by 1 − 1/n of their side are n² tilings. Each is a whole run of the model: its tiles lie side by
side, as those that the slide model was trained on, and its map sums to its own score. So their mean sums to the mean of
their scores, and the model sees n² times the tiles.
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
        ManifestError: there are no maps of tokens that it could average, or no tiles to lay.
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
            f"tiles that overlap must be encoded, got --overlap {settings.overlap:g} beside --features "
            f"{settings.features_dir}; leave one of them out"
        )


def tilings_of(overlap: float, side: int) -> list[tuple[int, int]]:
    """(x, y), how many tokens each tiling begins before the slide's corner; the first begins there.

    Args:
        overlap: the share of a tile's side.
        side: tokens along a tile.

    Raises:
        ManifestError: tiles cannot overlap by that and lie on tokens.

    Example:
        >>> tilings_of(0.5, 8)
        [(0, 0), (4, 0), (0, 4), (4, 4)]
    """
    along = [n for n in range(1, side + 1) if side % n == 0]
    nearest = min(along, key=lambda n: abs(1 - 1 / n - overlap))
    if abs(1 - 1 / nearest - overlap) > 0.005:
        shares = ", ".join(f"{1 - 1 / n:.3g}" for n in along)
        raise ManifestError(
            f"tiles of {side} tokens along must overlap by a share that leaves them on tokens, got --overlap "
            f"{overlap:g}; take one of {shares}"
        )
    starts = range(0, side, side // nearest)
    return [(x, y) for y in starts for x in starts]
