"""How many tiles a batch holds: always the same number, or as many as have a number of kept tokens together.

A masked encoder's work and memory grow with the tokens, not with the tiles: batches of as many tiles each are small
products where little of a tile is tissue, and large ones where all of it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from maskattn.errors import ManifestError

if TYPE_CHECKING:
    import numpy as np

    from maskattn.nn.encoders.tile_encoder import TileEncoder
    from maskattn.shapes import Bool, Int
    from maskattn.slide.shared_requests import SharedSettings

__all__ = ["check_batches", "check_tokens_of", "equal_batches", "sizes_of_batches"]

# Pixels are decoded for whole tiles, so a batch of almost empty tiles must not hold any number of them.
_MOST_TIMES_FULL = 4


def check_batches(settings: SharedSettings) -> None:
    """Refuse a number of tiles together with a number of tokens.

    Raises:
        ManifestError: both are given.
    """
    if settings.tokens_per_batch is not None and settings.batch_size != type(settings).batch_size:
        raise ManifestError(
            f"a batch is bounded by its tiles or by its tokens, got --batch-size {settings.batch_size} and "
            f"--tokens-per-batch {settings.tokens_per_batch}; give one of the two"
        )


def check_tokens_of(settings: SharedSettings, encoder: TileEncoder | None) -> None:
    """Refuse batches by tokens for an encoder whose tiles have none.

    Args:
        settings: the request.
        encoder: the encoder of tiles; None if it is not loaded, or features are given.

    Raises:
        ManifestError: the encoder is not a packed vision transformer.
    """
    if settings.tokens_per_batch is not None and encoder is not None and encoder.vit is None:
        raise ManifestError(
            f"--tokens-per-batch needs a packed vision transformer, got {encoder.name}: {encoder.why_not}; give "
            "--batch-size"
        )


def sizes_of_batches(
    settings: SharedSettings, tiles: int, keep_THW: Bool[np.ndarray, "T h w"] | None, tokens_per_tile: int
) -> list[int]:
    """Return the number of tiles in each batch of a slide, in order.

    Args:
        settings: the request; without ``tokens_per_batch`` all batches but the last hold ``batch_size`` tiles.
        tiles: the number of the slide's tiles.
        keep_THW: (T, h, w) bool, True for kept tokens; None if all tokens take part.
        tokens_per_tile: the number of a tile's tokens, kept or not.
    """
    import numpy as np  # not above: help and completion read the request's checks

    most = settings.tokens_per_batch
    if most is None:
        return equal_batches(tiles, settings.batch_size)
    kept_T = np.full(tiles, tokens_per_tile) if keep_THW is None else keep_THW.sum(axis=(1, 2))
    most_tiles = max(1, _MOST_TIMES_FULL * most // tokens_per_tile)
    return _as_many_as_fit(kept_T, most, most_tiles)


def equal_batches(tiles: int, batch_size: int) -> list[int]:
    """Return the number of tiles in each batch: ``batch_size``, and the rest in the last."""
    return [end - first for first, end in pairwise([*range(0, tiles, batch_size), tiles])]


def _as_many_as_fit(kept_T: Int[np.ndarray, " T"], most_tokens: int, most_tiles: int) -> list[int]:
    """Fill each batch with the next tiles until another would exceed either number; a batch has at least one tile."""
    ends_T = kept_T.cumsum()
    sizes: list[int] = []
    first = taken = 0
    while first < len(kept_T):
        end = int(ends_T.searchsorted(taken + most_tokens, side="right"))
        end = min(max(end, first + 1), first + most_tiles)
        sizes.append(end - first)
        first, taken = end, int(ends_T[end - 1])
    return sizes
