"""``relevance.geojson``: tiles or tokens, and regions of high relevance, as objects that QuPath opens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import Float
from maskattn.slide.outlines.merging import merged, rings_of
from maskattn.slide.outlines.rules import RegionRule, parse_regions
from maskattn.slide.outlines.writing import PALETTE, FeatureFile, ObjectClass, feature_collection, number
from maskattn.slide.sinks.sink import ExplainedSlide, ExplainedTiles, Take

if TYPE_CHECKING:
    from maskattn.slide.request import RunSettings

__all__ = ["GeoJson"]


class GeoJson:
    """An object for each tile or token with its relevance, and an annotation for each requested region."""

    files = ("relevance.geojson",)
    needs_no_slide = True

    def is_asked_for(self, settings: RunSettings) -> bool:
        """Return whether ``--geojson`` asks for tiles or tokens."""
        return settings.geojson != "off"

    @contextmanager
    def open(self, folder: Path, slide: ExplainedSlide) -> Iterator[Take]:
        """Write each batch when it comes, and the regions after the last one."""
        if not getattr(slide.header, "on_level0", True):
            raise SlideError(
                "relevance.geojson must be in pixels of level 0, got features whose tiles do not lie on it; give the "
                "slide beside its features, or leave --geojson out"
            )
        about = {
            "slide_id": slide.slide_id,
            "model": slide.model.name,
            "method": slide.method,
            "coordinates": "pixels of level 0",
        }
        of = " ".join((slide.slide_id, slide.model.name, slide.method))
        with feature_collection(folder / "relevance.geojson", about, of) as file:
            objects = _Objects(slide, file)
            yield objects.write
            objects.write_regions()


class _Objects:
    """Writes the objects of the batches, and keeps boxes and relevance of the classes that have regions.

    Dimension key: B tiles of a batch, (h, w) tokens of a tile, K classes, R rules of regions, N tiles or tokens.
    """

    def __init__(self, slide: ExplainedSlide, file: FeatureFile) -> None:
        self._slide, self._file = slide, file
        # Some models have no token maps, and neither have features without slides; the run's notes say why.
        self._of_tokens = slide.settings.geojson == "tokens" and slide.with_tokens
        self._kind = "detection" if self._of_tokens else "tile"
        names = slide.model.classes
        self._classes = [ObjectClass(name, PALETTE[k % len(PALETTE)]).text for k, name in enumerate(names)]
        self._rules = [(rule, names.index(rule.class_name)) for rule in parse_regions(slide.settings.regions or ())]
        self._labels = [f"relevance: {name}" for name in names]
        self._scores = [(f"probability: {name}", slide.scores[name]) for name in names]
        self._has_attention = bool(slide.attention_T.any())  # some slide models have none
        self._boxes: list[Float[np.ndarray, "N 4"]] = []
        self._relevance: list[Float[np.ndarray, "R N"]] = []

    def write(self, tiles: ExplainedTiles) -> None:
        """Write an object for each tile, or each kept token, of a batch."""
        slide = self._slide
        attention_B11 = slide.attention_T[tiles.tiles_B, None, None]
        relevance_KBhw, attention_Bhw = slide.relevance_KT[:, tiles.tiles_B, None, None], attention_B11
        keep_Bhw = np.ones(attention_B11.shape, bool)
        if self._of_tokens:
            assert tiles.relevance_KBhw is not None, "batches carry maps of tokens"
            assert tiles.attention_Bhw is not None, "maps of tokens come together"
            relevance_KBhw, attention_Bhw = tiles.relevance_KBhw, tiles.attention_Bhw * attention_B11
            keep_Bhw = tiles.keep_Bhw
        for tile, corner in enumerate(slide.coords_T2[tiles.tiles_B]):
            xs, ys = self._edges(corner, keep_Bhw.shape[1:])
            rows, columns = np.nonzero(keep_Bhw[tile])
            relevance_KN = relevance_KBhw[:, tile, rows, columns]
            self._write_objects((xs, ys), (rows, columns), relevance_KN, attention_Bhw[tile, rows, columns])
            if self._rules:
                self._boxes.append(np.stack([xs[columns], ys[rows], xs[columns + 1], ys[rows + 1]], axis=1))
                self._relevance.append(relevance_KN[[k for _, k in self._rules]])

    def write_regions(self) -> None:
        """Write an annotation for each connected region whose tiles or tokens reach a class's threshold."""
        if not self._rules or not self._boxes:
            return
        boxes_N4, relevance_RN = np.concatenate(self._boxes), np.concatenate(self._relevance, axis=1)
        for (rule, k), relevance_N in zip(self._rules, relevance_RN, strict=True):
            self._write_regions_of(rule, k, boxes_N4, relevance_N)

    def _write_regions_of(self, rule: RegionRule, k: int, boxes_N4: np.ndarray, relevance_N: np.ndarray) -> None:
        import shapely

        threshold = rule.threshold(relevance_N)
        reaches = relevance_N >= threshold if not rule.is_percentile else (relevance_N >= threshold) & (relevance_N > 0)
        boxes_N4, relevance_N = boxes_N4[reaches], relevance_N[reaches]
        regions = merged(boxes_N4)
        centres = shapely.points((boxes_N4[:, 0] + boxes_N4[:, 2]) / 2, (boxes_N4[:, 1] + boxes_N4[:, 3]) / 2)
        of_centre, of_region = shapely.STRtree(regions).query(centres, predicate="within")
        held = np.bincount(of_region, minlength=len(regions))
        sums = np.bincount(of_region, relevance_N[of_centre], minlength=len(regions))
        what = "tokens" if self._of_tokens else "tiles"
        for region, count, total in zip(regions, held.tolist(), sums.tolist(), strict=True):
            measurements = [(what, count), (self._labels[k], total), ("threshold", threshold), self._scores[k]]
            name = f"{rule.class_name}: relevance of at least {threshold:.3g}"
            self._file.write_region(rings_of(region), self._classes[k], name, measurements)

    def _edges(self, corner: np.ndarray, tokens: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the x and the y of the edges of a tile's tokens, or of the tile, clipped to the slide.

        Neighbouring tokens of two tiles have exactly equal edges, because offsets are divided last.
        """
        grid, header = self._slide.grid, self._slide.header
        width, height = (
            side or math.inf for side in (grid.width_px or header.width_px, grid.height_px or header.height_px)
        )
        rows, columns = tokens
        xs = corner[0] + np.arange(columns + 1) * grid.tile_lv0 / columns
        ys = corner[1] + np.arange(rows + 1) * grid.tile_lv0 / rows
        return np.clip(xs, 0, width), np.clip(ys, 0, height)

    def _write_objects(
        self,
        edges: tuple[np.ndarray, np.ndarray],
        positions: tuple[np.ndarray, np.ndarray],
        relevance_KN: np.ndarray,
        attention_N: np.ndarray,
    ) -> None:
        """Write objects, each in its class of highest relevance; one without positive relevance is unclassified."""
        xs, ys = ([number(edge) for edge in axis.tolist()] for axis in edges)
        highest_N = relevance_KN.argmax(axis=0).tolist()
        values_NK = relevance_KN.T.tolist()
        rows, columns = (indices.tolist() for indices in positions)
        for row, column, k, values, attention in zip(
            rows, columns, highest_N, values_NK, attention_N.tolist(), strict=True
        ):
            box = xs[column], ys[row], xs[column + 1], ys[row + 1]
            of_class = self._classes[k] if values[k] > 0 else None
            measurements = [*zip(self._labels, values, strict=True), *self._scores]
            if self._has_attention:
                measurements.append(("attention", attention))
            self._file.write_box(self._kind, box, of_class, measurements)
