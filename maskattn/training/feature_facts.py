"""The metadata of a cohort's features, read once before training starts.

Every file is read completely, so that NaN or another encoder is found now and not after hours of training.
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
        tiles: number of tiles.
        width: C, the width of the features.
        encoder: the encoder's name; None if the file does not record it.
        spacing_um: µm per pixel of a tile; None if not recorded.
        patch_px: side of a tile in pixels; None if not recorded.
        token_mask: "tissue" if background tokens were left out, "none" if not; None if not recorded.
    """

    tiles: int
    width: int
    encoder: str | None
    spacing_um: float | None
    patch_px: int | None
    token_mask: Literal["none", "tissue"] | None

    def card(self) -> ModelCard:
        """Return the metadata as a model card, for comparison."""
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
    """Read the metadata of each slide's features.

    Args:
        files: slide → file.
        encoder: the encoder whose features are read if a file has those of several.
        on_slide: called as on_slide(slide, number done, number of slides).

    Raises:
        SlideError: a file cannot be used, or has no tiles; the error names it.
    """
    found = {}
    for done, (slide_id, path) in enumerate(files.items(), 1):
        status = path.stat()
        found[slide_id] = _facts_of(path, encoder, slide_id, status.st_size, status.st_mtime_ns)
        if on_slide is not None:
            on_slide(slide_id, done, len(files))
    return found


# Cached, because the folds of a cross-validation share their files.
@lru_cache(maxsize=100_000)
def _facts_of(path: Path, encoder: str | None, slide_id: str, _size: int, _changed: int) -> FeatureFacts:
    tiles = read_features(path, encoder=encoder, named=(slide_id, path.stem))
    if not len(tiles.features_TC):
        raise SlideError(
            f"a slide must have tiles, got none for {slide_id!r} in {as_text(path)}; remove its row from the labels"
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
    """Return the metadata that all files share; ``tiles`` is their sum.

    Args:
        facts: slide → metadata of its file.
        encoder: the encoder's name, if the files do not record it.
        token_mask: the token mask, if the files do not record it.

    Raises:
        SlideError: the files have different encoders, spacings, tiles or masks, or not those that are given.
    """
    shared = FeatureFacts(
        tiles=sum(one.tiles for one in facts.values()),
        width=next(iter(facts.values())).width,
        encoder=encoder or _first([one.encoder for one in facts.values()]),
        spacing_um=_first([one.spacing_um for one in facts.values()]),
        patch_px=_first([one.patch_px for one in facts.values()]),
        token_mask=token_mask or _first([one.token_mask for one in facts.values()]),
    )
    unlike: dict[str, list[str]] = {}
    for slide_id, one in facts.items():
        wrong = mismatches(shared.card(), one.card())
        if one.width != shared.width and not any("width" in each for each in wrong):
            wrong.append(f"width of features {one.width} instead of {shared.width}")
        if wrong:
            unlike.setdefault("; ".join(wrong), []).append(slide_id)
    if unlike:
        counted = "; ".join(f"{why} on {len(slides)} slides ({some_of(slides, 3)})" for why, slides in unlike.items())
        same = "those asked for" if encoder or token_mask else "the same for all slides"
        raise SlideError(
            f"the features of a training must have one encoder, spacing and token mask, {same}, got {counted}, of "
            f"{len(facts)} slides; name a folder with those of one"
        )
    return shared


def _first(values: Sequence[Any]) -> Any:
    return next((value for value in values if value is not None), None)
