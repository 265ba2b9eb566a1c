"""Build a slide's section of the report: scores, pictures, the most relevant tiles of each class, and notes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskattn.errors import SlideError
from maskattn.slide.colours import COLOUR_MAPS, colour_limit, kind_of_attention
from maskattn.slide.finished import (
    FinishedSlide,
    MapTable,
    Mosaic,
    build_mosaic,
    open_maps,
    open_slide,
)
from maskattn.slide.prediction import SlidePrediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.report.facts import facts_of, map_sentence, notes_of, score_table
from maskattn.slide.report.markup import Markup, element, joined
from maskattn.slide.report.pictures import (
    OVERVIEW_PX,
    colour_bar,
    map_over,
    outlined,
    picture,
    sampled,
    tile_with_map,
    with_squares,
)

__all__ = ["MOST_CLASSES", "slide_part"]

MOST_CLASSES = 6
_TILE_PX = 160
_FOR, _AGAINST = (178, 24, 43), (33, 102, 172)


@dataclass(frozen=True, eq=False)
class _Shown:
    """The data from which the pictures of one slide are made."""

    reader: SlideReader
    table: MapTable
    thumbnail: np.ndarray
    top: int

    @property
    def lv0_per_px(self) -> float:
        return self.table.width_px / self.thumbnail.shape[1]

    def sampled(self, mosaic: Mosaic) -> np.ndarray:
        return sampled(mosaic, (self.table.width_px, self.table.height_px), self.thumbnail.shape[:2])


def slide_part(slide: FinishedSlide, top: int, slides_dir: Path | None) -> Markup:
    """Return the section of one slide, without its heading.

    Args:
        slide: the slide.
        top: the number of tiles to show for each class, and against it.
        slides_dir: a folder to search for the slide's file first.
    """
    if slide.prediction is None:
        return element("p", f"There are no outputs: {slide.reason or 'no reason is recorded'}.", class_="failed")
    elements = [_verdict_line(slide.prediction), score_table(slide.prediction)]
    try:
        elements.append(_pictures(slide, top, slides_dir))
    except (SlideError, OSError) as error:
        elements.append(element("p", f"There are no pictures: {error}.", class_="failed"))
    return joined([*elements, notes_of(slide), facts_of(slide.prediction)])


def _verdict_line(prediction: SlidePrediction) -> Markup:
    score = prediction.scores[prediction.prediction]
    demonstration = " by a demonstration model, whose classes are meaningless on real tissue"
    return element(
        "p",
        "Predicted ",
        element("strong", prediction.prediction),
        f", score {score:.3f}{demonstration if prediction.model.demonstration else ''}.",
        class_="predicted",
    )


def _pictures(slide: FinishedSlide, top: int, slides_dir: Path | None) -> Markup:
    prediction = slide.prediction
    assert prediction is not None
    with open_maps(slide.maps_path) as table, open_slide(slide, slides_dir) as reader:
        shown = _Shown(reader, table, reader.thumbnail(OVERVIEW_PX), top)
        attention = build_mosaic(table, len(table.classes))
        values = shown.sampled(attention)
        units = "tokens" if table.tokens_hw else "tiles"
        overview = element(
            "figure",
            picture(outlined(shown.thumbnail, np.isfinite(values)), f"Thumbnail of {slide.slide_id}"),
            element("figcaption", f"The slide; the line surrounds the {units} that took part."),
        )
        kind = kind_of_attention(values)
        limits, colours = colour_limit(values, kind), COLOUR_MAPS[kind][0]
        attended = element(
            "figure",
            picture(map_over(shown.thumbnail, values, limits, colours), "Map of attention"),
            element("figcaption", "Attention of the slide model. ", colour_bar(limits, colours)),
        )
        ranked = sorted(prediction.scores, key=prediction.scores.__getitem__, reverse=True)
        classes = [name for name in ranked if name in table.classes]
        sections = [_class_part(shown, prediction, name) for name in classes[:MOST_CLASSES]]
    left_out = len(classes) - len(sections)
    more = [element("p", f"{left_out} classes of lower scores are left out here; relevance.h5 contains them.")]
    return joined([element("div", overview, attended, class_="pictures"), *sections, *(more if left_out else [])])


def _class_part(shown: _Shown, prediction: SlidePrediction, name: str) -> Markup:
    """Return the map of a class over the slide, and the tiles with the most relevance for and against it."""
    table, index = shown.table, shown.table.classes.index(name)
    mosaic = build_mosaic(table, index)
    limits, colours = colour_limit(mosaic.levels[0], "diverging"), COLOUR_MAPS["diverging"][0]
    order = np.argsort(table.values_MT[index], kind="stable")
    against = [int(tile) for tile in order[: shown.top] if table.values_MT[index, tile] < 0]
    in_favour = [int(tile) for tile in order[::-1][: shown.top] if table.values_MT[index, tile] > 0]
    image = map_over(shown.thumbnail, shown.sampled(mosaic), limits, colours)
    for tiles, colour in ((in_favour, _FOR), (against, _AGAINST)):
        corners = [(int(x), int(y)) for x, y in table.coords_T2[tiles]]
        image = with_squares(image, corners, table.tile_lv0, shown.lv0_per_px, colour)
    figure = element(
        "figure",
        picture(image, f"Map of relevance for class {name}"),
        element("figcaption", f"Relevance for {name}, + for and − against. ", colour_bar(limits, colours)),
    )
    rows = [
        _tiles(shown, index, tiles, limits, colours, f"{heading} {name}")
        for tiles, heading in ((in_favour, "For"), (against, "Against"))
    ]
    heading = element("h3", f"{name}, score {prediction.scores[name]:.3f}")
    verdict = element("p", map_sentence(prediction, name), class_="check")
    return element("section", heading, verdict, element("div", figure, element("div", *rows), class_="class"))


def _tiles(
    shown: _Shown, index: int, tiles: list[int], limits: tuple[float, float], colours: str, heading: str
) -> Markup:
    if not tiles:
        return joined([element("h4", heading), element("p", "No tile.")])
    figures = [_tile(shown, index, tile, limits, colours) for tile in tiles]
    return joined([element("h4", heading), element("div", *figures, class_="tiles")])


def _tile(shown: _Shown, index: int, tile: int, limits: tuple[float, float], colours: str) -> Markup:
    table = shown.table
    x_lv0, y_lv0 = (int(value) for value in table.coords_T2[tile])
    value = f"{table.values_MT[index, tile]:+.3g}".replace("-", "−")
    side = (table.tile_lv0, table.tile_lv0)
    try:
        pixels = shown.reader.read_region(x_lv0, y_lv0, side, (_TILE_PX, _TILE_PX), tolerant=True)
    except SlideError as error:
        return element("figure", element("figcaption", f"x {x_lv0}, y {y_lv0}: {value}. {error}."))
    pictures = [picture(pixels, f"Tile at x {x_lv0}, y {y_lv0}")]
    tokens = table.tokens_of(tile)
    if tokens is not None:
        image = tile_with_map(pixels, tokens.values_Mhw[index], limits, colours)
        pictures.append(picture(image, f"Token map of the tile at x {x_lv0}, y {y_lv0}"))
    return element("figure", *pictures, element("figcaption", f"{value} at x {x_lv0}, y {y_lv0}"))
