"""``heatmap_<class>.ome.tiff``, ``attention.ome.tiff`` and ``relevance.zarr``: maps to overlay on the slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskattn.shapes import Float, UInt8
from maskattn.slide.colours import COLOUR_MAPS, Kind, colour_limit, coloured
from maskattn.slide.pyramids.lattice import MapLattice
from maskattn.slide.pyramids.ome_tiff import write_ome_tiff
from maskattn.slide.pyramids.ome_zarr import ATTENTION, write_ome_zarr
from maskattn.slide.sinks.heatmaps import file_names_of, values_of
from maskattn.slide.sinks.sink import ExplainedSlide, ExplainedTiles, Take

if TYPE_CHECKING:
    from maskattn.slide.request import RunSettings

__all__ = ["Pyramids"]

_GLASS = 255


class Pyramids:
    """The maps of all classes and of attention, with values, in colours, or both."""

    files = (
        "heatmap_*.ome.tiff",
        "attention.ome.tiff",
        "colours_*.ome.tiff",
        "attention_colours.ome.tiff",
        "relevance.zarr",
    )

    def is_asked_for(self, settings: RunSettings) -> bool:
        """Return whether ``--ome-tiff`` or ``--zarr`` asks for a pyramid."""
        return settings.ome_tiff != "off" or settings.zarr

    @contextmanager
    def open(self, folder: Path, slide: ExplainedSlide) -> Iterator[Take]:
        """Place the batches on a lattice of tokens, and write its pyramids after the last batch."""
        with closing(MapLattice(len(slide.model.classes) + 1, slide.grid, slide.coords_T2, folder)) as lattice:

            def take(tiles: ExplainedTiles) -> None:
                lattice.paint(slide.coords_T2[tiles.tiles_B], values_of(slide, tiles), tiles.keep_Bhw)

            yield take
            _write(folder, slide, lattice)


def _write(folder: Path, slide: ExplainedSlide, lattice: MapLattice) -> None:
    spacing_um, settings = slide.slide_reader.info.spacing_um, slide.settings
    names = [f"relevance: {name}" for name in slide.model.classes]
    files = [(f"heatmap_{name}", f"colours_{name}") for name in file_names_of(slide.model.classes)]
    if slide.attention_T.any():  # some slide models have none
        names.append(ATTENTION)
        files.append(("attention", "attention_colours"))
    for index, (values, in_colours) in enumerate(files):
        if settings.ome_tiff in ("values", "both"):
            write_ome_tiff(folder / f"{values}.ome.tiff", lattice, index, names[index], spacing_um)
        if settings.ome_tiff in ("colours", "both"):
            paint = _painter(
                lattice.values_MRC[index], "diverging" if index < len(slide.model.classes) else "sequential"
            )
            write_ome_tiff(folder / f"{in_colours}.ome.tiff", lattice, index, names[index], spacing_um, paint)
    if settings.zarr:
        write_ome_zarr(folder / "relevance.zarr", lattice, names, slide.slide_id, spacing_um)


def _painter(
    values_RC: Float[np.ndarray, "R C"], kind: Kind
) -> Callable[[Float[np.ndarray, "Y X"]], UInt8[np.ndarray, "Y X 3"]]:
    """Return a function that maps values to the colours of the same map's PNG, on white."""
    limits = colour_limit(values_RC, kind)

    def paint(block_YX: Float[np.ndarray, "Y X"]) -> UInt8[np.ndarray, "Y X 3"]:
        known = np.isfinite(block_YX)
        image = np.full((*block_YX.shape, 3), _GLASS, np.uint8)
        # A block has few tokens and many pixels, so each distinct value is looked up once.
        values, inverse = np.unique(block_YX[known], return_inverse=True)
        image[known] = coloured(values, limits, COLOUR_MAPS[kind][0])[inverse]
        return image

    return paint
