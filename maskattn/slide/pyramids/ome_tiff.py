"""Write a map as a tiled OME-TIFF of the size of the slide's level 0, with its pyramid in SubIFDs.

Blocks are compressed one at a time as they are written; the block of nothing but background is compressed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from maskattn.files import replacing
from maskattn.shapes import Float, Shaped
from maskattn.slide.names import as_text
from maskattn.slide.pyramids.lattice import BLOCK_PX, MapLattice

__all__ = ["write_ome_tiff"]

_LEVEL = 1  # of deflate, which is enough for uniform squares


def write_ome_tiff(
    path: Path,
    lattice: MapLattice,
    of_map: int,
    name: str,
    spacing_um: float,
    paint: Callable[[Float[np.ndarray, "Y X"]], Shaped[np.ndarray, "Y X 3"]] | None = None,
) -> None:
    """Write one map.

    Args:
        path: the file to write.
        lattice: the maps.
        of_map: index of the map.
        name: the name of the image and of its one channel.
        spacing_um: µm per level-0 pixel.
        paint: maps values to RGB for a picture; None writes the values, as float32 with NaN for background.

    Raises:
        OSError: the file cannot be written.
    """
    import tifffile

    shapes = lattice.level_shapes()
    coarse = lattice.coarse_levels(of_map)
    channel = as_text(name)
    metadata = {
        "axes": "YX" if paint is None else "YXS",
        "Name": channel,
        "Channel": {"Name": channel},
        "PhysicalSizeX": spacing_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": spacing_um,
        "PhysicalSizeYUnit": "µm",
    }
    kind = {"photometric": "minisblack" if paint is None else "rgb", "compression": "adobe_deflate"}
    with replacing(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=True, ome=True) as file:
        for level, shape in enumerate(shapes):
            file.write(
                _encoded(lattice.blocks(of_map, level, coarse), paint),
                shape=shape if paint is None else (*shape, 3),
                dtype=np.float32 if paint is None else np.uint8,
                tile=(BLOCK_PX, BLOCK_PX),
                resolution=(1e4 / (spacing_um * 2**level),) * 2,
                resolutionunit="CENTIMETER",
                subifds=len(shapes) - 1 if level == 0 else 0,
                subfiletype=int(level > 0),
                metadata=metadata if level == 0 else None,
                software="maskattn" if level == 0 else False,
                **kind,
            )


def _encoded(
    blocks: Iterator[Float[np.ndarray, "Y X"]],
    paint: Callable[[Float[np.ndarray, "Y X"]], Shaped[np.ndarray, "Y X 3"]] | None,
) -> Iterator[bytes]:
    import imagecodecs

    def encode(block: np.ndarray) -> bytes:
        shown = block if paint is None else paint(block)
        return bytes(imagecodecs.zlib_encode(shown.tobytes(), level=_LEVEL))

    background: bytes | None = None
    for block in blocks:
        if np.isnan(block).all():
            background = background or encode(block)
            yield background
        else:
            yield encode(block)
