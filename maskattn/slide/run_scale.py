"""One colour scale for the pictures of all slides of a run, which are redrawn after the last slide.

The range of a class's values on all slides is known only after the last slide. Maps are stored at the thumbnail's
resolution, with the thumbnail, in ``heatmaps.npz``, so that no slide need be read or run again, even if a later run
adds slides.

Dimension key: M maps, (Y, X) thumbnail pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from maskattn.errors import OutputError
from maskattn.files import replacing
from maskattn.shapes import Float, UInt8
from maskattn.slide.colours import Kind, colour_limit, widest
from maskattn.slide.names import as_text
from maskattn.slide.overlay import write_heatmap

__all__ = ["KEPT_MAPS", "Picture", "draw_on_one_scale", "keep_maps"]

KEPT_MAPS = "heatmaps.npz"


@dataclass(frozen=True)
class Picture:
    """The description of a map's picture.

    Attributes:
        file_name: the name of the PNG file.
        title: the title above the map.
        label: the label of the colour bar.
        kind: the kind of the map.
    """

    file_name: str
    title: str
    label: str
    kind: Kind


def keep_maps(
    folder: Path,
    thumbnail_YX3: UInt8[np.ndarray, "Y X 3"],
    values_MYX: Float[np.ndarray, "M Y X"],
    pictures: Sequence[Picture],
    um_per_px: float,
) -> None:
    """Store the maps of a slide's pictures, with the thumbnail, in ``heatmaps.npz``.

    Args:
        folder: the slide's output folder.
        thumbnail_YX3: (Y, X, 3) RGB.
        values_MYX: (M, Y, X) the maps, NaN for background.
        pictures: the descriptions of the M pictures, in the maps' order.
        um_per_px: µm per thumbnail pixel.

    Raises:
        OSError: the file cannot be written.
    """
    limits_M2 = np.array([colour_limit(values, one.kind) for values, one in zip(values_MYX, pictures, strict=True)])
    described = json.dumps([asdict(picture) for picture in pictures])
    with replacing(folder / KEPT_MAPS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, thumbnail=thumbnail_YX3, values=values_MYX, limits=limits_M2, pictures=described, um_per_px=um_per_px
        )


def draw_on_one_scale(folders: Iterable[Path]) -> None:
    """Redraw the pictures of slides, each map on the widest scale that its class has on any slide.

    Args:
        folders: the slides' output folders; those without stored maps are left as they are.

    Raises:
        OutputError: a file cannot be read or written.
    """
    kept = [folder / KEPT_MAPS for folder in folders]
    kept = [path for path in kept if path.is_file()]
    try:
        limits_of: dict[str, list[tuple[float, float]]] = {}
        for path in kept:
            with np.load(path) as maps:
                for picture, limits in zip(_pictures_of(maps), maps["limits"].tolist(), strict=True):
                    limits_of.setdefault(picture.file_name, []).append(tuple(limits))
        for path in kept:
            with np.load(path) as maps:
                thumbnail, um_per_px = maps["thumbnail"], float(maps["um_per_px"])
                for picture, values in zip(_pictures_of(maps), maps["values"], strict=True):
                    limits = widest(limits_of[picture.file_name], picture.kind)
                    title = f"{picture.title}; one scale for the run"
                    file = path.parent / picture.file_name
                    write_heatmap(file, thumbnail, values, title, picture.label, picture.kind, um_per_px, limits)
    except OSError as error:
        raise OutputError(
            f"pictures on one scale must be drawn where their slides are, got {as_text(kept[0].parent.parent)}: "
            f"{error.strerror or error}; free space and run it again, finished slides are skipped"
        ) from error


def _pictures_of(maps: np.lib.npyio.NpzFile) -> list[Picture]:
    return [Picture(**fields) for fields in json.loads(str(maps["pictures"]))]
