"""The metadata of a cohort's features, read once before anything is trained.

Every file is read whole, so that one with NaN, or of another encoder, is found now and not in the third hour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from maskattn.errors import SlideError
from maskattn.evaluation.predictions import some_of
from maskattn.nn.slide_models.card import EncoderFacts, ModelCard, mismatches
from maskattn.slide.layouts import read_features
from maskattn.slide.names import as_text

__all__ = ["FeatureFacts", "facts_of_cohort", "look_through"]


@dataclass(frozen=True)
class FeatureFacts:
    """The metadata of a file of features.

    Attributes:
        tiles: how many there are.
        width: C of the features.
        encoder: its name; None where the file does not say it.
        spacing_um: µm per px of a tile; None as above.
        patch_px: side of a tile; None as above.
        token_mask: what the encoder saw; None as above.
    """

    tiles: int
    width: int
    encoder: str | None
    spacing_um: float | None
    patch_px: int | None
    token_mask: Literal["none", "tissue"] | None

    def card(self) -> ModelCard:
        """The facts as a card, which can be compared."""
        return ModelCard(
            name="features",
            kind="features",
            classes=(),
            encoder=None if self.encoder is None else EncoderFacts(self.encoder, self.width),
            spacing_um=self.spacing_um,
            patch_px=self.patch_px,
            token_mask=self.token_mask,
        )


def look_through(
    files: Mapping[str, Path], encoder: str | None = None, on_slide: Callable[[str, int, int], None] | None = None
) -> dict[str, FeatureFacts]:
    """The metadata of each slide's features.

    Args:
        files: slide → file.
        encoder: whose features, where a file holds those of several.
        on_slide: called with (slide, how many are done, how many there are).

    Raises:
        SlideError: a file cannot be used, or has no tiles; it is named.
    """
    found = {}
    for done, (slide_id, path) in enumerate(files.items(), 1):
        status = path.stat()
        found[slide_id] = _facts_of(path, encoder, slide_id, status.st_size, status.st_mtime_ns)
        if on_slide is not None:
            on_slide(slide_id, done, len(files))
    return found


# The folds of a cross-validation have the same files.
@lru_cache(maxsize=100_000)
def _facts_of(path: Path, encoder: str | None, slide_id: str, _size: int, _changed: int) -> FeatureFacts:
    tiles = read_features(path, encoder=encoder, named=(slide_id, path.stem))
    if not len(tiles.features_TC):
        raise SlideError(
            f"a slide must have tiles, got none for {slide_id!r} in {as_text(path)}; take its row out of the labels"
        )
    return FeatureFacts(
        tiles=len(tiles.features_TC),
        width=tiles.features_TC.shape[1],
        encoder=tiles.encoder,
        spacing_um=tiles.spacing_um,
        patch_px=tiles.patch_size_px,
        token_mask=tiles.token_mask,
    )


def facts_of_cohort(
    facts: Mapping[str, FeatureFacts], encoder: str | None = None, token_mask: Literal["none", "tissue"] | None = None
) -> FeatureFacts:
    """What all files say together; ``tiles`` is their sum.

    Args:
        facts: slide → what its file says.
        encoder: the encoder's name, where the files do not say it.
        token_mask: what it saw, where they do not.

    Raises:
        SlideError: they are of different encoders, spacings, tiles or masks, or not of those that are given.
    """
    together = FeatureFacts(
        tiles=sum(one.tiles for one in facts.values()),
        width=next(iter(facts.values())).width,
        encoder=encoder or _first([one.encoder for one in facts.values()]),
        spacing_um=_first([one.spacing_um for one in facts.values()]),
        patch_px=_first([one.patch_px for one in facts.values()]),
        token_mask=token_mask or _first([one.token_mask for one in facts.values()]),
    )
    unlike: dict[str, list[str]] = {}
    for slide_id, one in facts.items():
        wrong = mismatches(together.card(), one.card())
        if one.width != together.width and not any("width" in each for each in wrong):
            wrong.append(f"width of features {one.width} instead of {together.width}")
        if wrong:
            unlike.setdefault("; ".join(wrong), []).append(slide_id)
    if unlike:
        told = "; ".join(f"{why} on {len(slides)} slides ({some_of(slides, 3)})" for why, slides in unlike.items())
        same = "as is asked for" if encoder or token_mask else "as of the others"
        raise SlideError(
            f"the features of a training must be of one encoder, spacing and token mask, {same}, got {told}, of "
            f"{len(facts)} slides; name a folder that holds those of one"
        )
    return together


def _first(said: Sequence[Any]) -> Any:
    return next((one for one in said if one is not None), None)
