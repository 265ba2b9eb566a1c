"""``heatmap_<class>.png`` and ``attention.png``: maps over the slide's thumbnail, of tokens if they are requested."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskattn.errors import SlideError
from maskattn.lettering import drawable
from maskattn.shapes import Float, UInt8
from maskattn.slide.canvas import MapCanvas, PaintedMap
from maskattn.slide.colours import kind_of_attention
from maskattn.slide.overlay import begin_heatmap, smoothed
from maskattn.slide.run_scale import KEPT_MAPS, Picture, keep_maps
from maskattn.slide.sinks.sink import ExplainedSlide, ExplainedTiles, Take

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideReader
    from maskattn.slide.request import RunSettings

__all__ = ["THUMBNAIL_PX", "Heatmaps", "file_names_of", "values_of"]

THUMBNAIL_PX = 1536
_MOST_NAME_BYTES = 150
_DRAWN_AT_ONCE = 2  # pictures; the arrays of each take some 40 MB, for a thumbnail of the greatest size

_logger = logging.getLogger(__name__)


class Heatmaps:
    """A map of relevance for each class, and one of attention."""

    files = ("heatmap_*.png", "attention.png", KEPT_MAPS)

    def is_asked_for(self, settings: RunSettings) -> bool:
        """Return True: every run writes heatmaps."""
        return True

    @contextmanager
    def open(self, folder: Path, slide: ExplainedSlide) -> Iterator[Take]:
        """Paint the batches on one canvas, and write its maps after the last batch."""
        info = slide.slide_reader.info
        thumbnail = _thumbnail(slide.slide_reader)
        slide_px = (info.height_px, info.width_px)
        canvas = MapCanvas(len(slide.model.classes) + 1, thumbnail.shape[:2], slide_px, slide.grid.tile_lv0)

        def take(tiles: ExplainedTiles) -> None:
            canvas.paint(slide.coords_T2[tiles.tiles_B], values_of(slide, tiles), tiles.keep_Bhw)

        yield take
        _write_heatmaps(folder, slide, thumbnail, canvas)


def values_of(slide: ExplainedSlide, tiles: ExplainedTiles) -> Float[np.ndarray, "M B h w"]:
    """Return the M = K + 1 maps of a batch, attention last: a value per token, or (h, w) = (1, 1) per tile."""
    attention_B11 = slide.attention_T[tiles.tiles_B, None, None]
    if tiles.relevance_KBhw is None or tiles.attention_Bhw is None:
        return np.concatenate([slide.relevance_KT[:, tiles.tiles_B, None, None], attention_B11[None]])
    return np.concatenate([tiles.relevance_KBhw, (tiles.attention_Bhw * attention_B11)[None]])


def _write_heatmaps(
    folder: Path, slide: ExplainedSlide, thumbnail: UInt8[np.ndarray, "Y X 3"], canvas: MapCanvas
) -> None:
    info = slide.slide_reader.info
    um_per_px = info.width_px * info.spacing_um / thumbnail.shape[1]
    pictures = _pictures_of(slide)
    maps: Sequence[PaintedMap | np.ndarray] = canvas.maps()[: len(pictures)]
    if slide.settings.smooth:
        grid = slide.grid
        step_lv0 = grid.token_lv0 if slide.with_tokens else grid.tile_lv0
        sigma_px = step_lv0 / 2 * thumbnail.shape[1] / info.width_px
        maps = [smoothed(values, sigma_px) for values in canvas.values_of_pixels()[: len(pictures)]]
        pictures = [replace(picture, title=f"{picture.title}; smoothed in the drawing") for picture in pictures]
    with ThreadPoolExecutor(_DRAWN_AT_ONCE) as threads:
        drawn = [
            threads.submit(
                begin_heatmap(folder / one.file_name, thumbnail, values, one.title, one.label, one.kind, um_per_px)
            )
            for one, values in zip(pictures, maps, strict=True)
        ]
    for picture in drawn:
        picture.result()
    if slide.settings.scale == "run":
        values_MYX = np.stack([one.of_pixels(one.values_V) if isinstance(one, PaintedMap) else one for one in maps])
        keep_maps(folder, thumbnail, values_MYX, pictures, um_per_px)


def _pictures_of(slide: ExplainedSlide) -> list[Picture]:
    """Return the file name, caption and colours of the picture of each class's map and of attention."""
    model = slide.model
    # A name with characters that the font lacks is left out; the file and its folder still identify the map.
    of = f"{slide_id}: " if (slide_id := drawable(slide.slide_id)) else ""
    about = [f"model {drawable(model.name)}"] if drawable(model.name) else []
    about += ["a demonstration model"] if model.demonstration else []
    by = f"; {', '.join(about)}" if about else ""
    if slide.settings.overlap and slide.with_tokens:
        by = f"; tiles overlap by {slide.settings.overlap:.0%}{by}"
    pictures = []
    for index, (name, file_name) in enumerate(zip(model.classes, file_names_of(model.classes), strict=True)):
        named = repr(drawable(name)) if drawable(name) else f"{index + 1} of {len(model.classes)}"
        verdict = slide.verdicts.get(name, "passed")
        warned = "" if verdict in ("passed", "skipped") else f"; map check: {verdict}"
        title = f"{of}relevance for class {named} by {slide.method}, score {slide.scores[name]:.3f}{warned}{by}"
        pictures.append(Picture(f"heatmap_{file_name}.png", title, "relevance (+ for, − against)", "diverging"))
    if not slide.attention_T.any():
        return pictures  # the slide model has none
    title = f"{of}attention of {slide.attention_of}{by}"
    kind = kind_of_attention(slide.attention_T)
    label = "attention" if kind == "sequential" else "attention (this model's may be below 0)"
    return [*pictures, Picture("attention.png", title, label, kind)]


def file_names_of(classes: Sequence[str]) -> list[str]:
    """Return the part of the file names that denotes each class: distinct on every file system, and short enough."""
    names = []
    for name in classes:
        plain = "".join("_" if sign in "/\\" or not sign.isprintable() else sign for sign in name)
        names.append(plain.encode()[:_MOST_NAME_BYTES].decode(errors="ignore"))
    if len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(names):
        return names
    return [f"{name}_{index}" for index, name in enumerate(names)]


def _thumbnail(reader: SlideReader) -> UInt8[np.ndarray, "Y X 3"]:
    """Return the slide's thumbnail, or a white one if damage prevents it: the readable tiles still have a map."""
    info = reader.info
    try:
        return reader.thumbnail(THUMBNAIL_PX)
    except SlideError as error:
        _logger.warning("no thumbnail of %s: %s", info.path, error)
        shrink = max(1.0, max(info.width_px, info.height_px) / THUMBNAIL_PX)
        height, width = (max(1, round(side / shrink)) for side in (info.height_px, info.width_px))
        return np.full((height, width, 3), 255, dtype=np.uint8)
