"""Write maps as OME-Zarr 0.5 (Zarr 3), with one pixel for each cell of the lattice and transforms to µm.

The format has scale transforms, so that maps need not be enlarged to level 0. The position of a pixel is that of its
centre, as in napari, and the centre of the slide's first pixel is 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.files import replacing
from maskattn.slide.colours import colour_limit, kind_of_attention
from maskattn.slide.names import as_text
from maskattn.slide.outlines.writing import PALETTE
from maskattn.slide.pyramids.halving import halved
from maskattn.slide.pyramids.lattice import BLOCK_PX, MapLattice

__all__ = ["ATTENTION", "write_ome_zarr"]

ATTENTION = "attention"

_BAND_PX = 1024


def write_ome_zarr(path: Path, lattice: MapLattice, names: Sequence[str], name: str, spacing_um: float) -> None:
    """Write maps as channels of one image.

    Args:
        path: the folder to create.
        lattice: the maps.
        names: the names of the channels, which are the first maps of the lattice or all of them.
        name: the name of the image.
        spacing_um: µm per level-0 pixel.

    Raises:
        OSError: the folder cannot be written.
    """
    import zarr

    shape = (len(names), *lattice.values_MRC.shape[1:])
    shapes = [shape]
    while max(shapes[-1][1:]) > BLOCK_PX:
        shapes.append((shape[0], (shapes[-1][1] + 1) // 2, (shapes[-1][2] + 1) // 2))
    with replacing(path) as temporary:
        group = zarr.open_group(store=str(temporary), mode="w", zarr_format=3)
        arrays: list[Any] = [
            group.create_array(
                str(level),
                shape=size,
                chunks=(1, min(BLOCK_PX, size[1]), min(BLOCK_PX, size[2])),
                dtype="float32",
                fill_value=float("nan"),
                dimension_names=["c", "y", "x"],
            )
            for level, size in enumerate(shapes)
        ]
        for channel in range(shape[0]):
            for row in range(0, shape[1], _BAND_PX):
                arrays[0][channel, row : row + _BAND_PX] = lattice.values_MRC[channel, row : row + _BAND_PX]
            for finer, coarser in itertools.pairwise(arrays):
                for row in range(0, coarser.shape[1], _BAND_PX):
                    coarser[channel, row : row + _BAND_PX] = halved(finer[channel, 2 * row : 2 * (row + _BAND_PX)])
        group.attrs["ome"] = _metadata(lattice, names, name, spacing_um, len(shapes))


def _metadata(lattice: MapLattice, names: Sequence[str], name: str, spacing_um: float, levels: int) -> dict[str, Any]:
    datasets = []
    for level in range(levels):
        pixel_lv0 = lattice.cell_lv0 * 2**level
        scale, centre = pixel_lv0 * spacing_um, (pixel_lv0 - 1) / 2 * spacing_um
        transforms = [
            {"type": "scale", "scale": [1.0, scale, scale]},
            {"type": "translation", "translation": [0.0, centre, centre]},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    channels = [_channel(label, index, lattice.values_MRC[index]) for index, label in enumerate(names)]
    return {
        "version": "0.5",
        "multiscales": [{"name": as_text(name), "axes": axes, "datasets": datasets}],
        "omero": {"channels": channels},
    }


def _channel(label: str, index: int, values_RC: np.ndarray) -> dict[str, Any]:
    """Return a viewer's initial settings of a map: relevance for a class in the class's colour, on black.

    Viewers add the channels up, so that ranges starting below zero would add up to white.
    """
    known = np.isfinite(values_RC)
    low, high = (float(pick(values_RC, where=known, initial=0.0)) for pick in (np.min, np.max))
    of_class = label != ATTENTION
    colours = [colour for colour in PALETTE if any(colour)]  # black would be invisible
    colour = "".join(f"{value:02X}" for value in colours[index % len(colours)]) if of_class else "FFFFFF"
    # Attention is hidden at first, so its range may start below zero, if a model gives negative weights.
    start, end = colour_limit(values_RC, "sequential" if of_class else kind_of_attention(values_RC))
    window = {"min": low, "max": high, "start": start, "end": end}
    return {"label": as_text(label), "color": colour, "active": of_class, "window": window}
