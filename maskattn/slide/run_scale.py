"""One scale for the pictures of a run: each slide keeps its maps as its pictures show them, and all are drawn last.

Which values a class has on all slides is known when the last one is done. A map is kept at the thumbnail's resolution,
with the thumbnail, in ``heatmaps.npz``, so that no slide is read again, nor run again where slides are added later.

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
        file_name: of the PNG.
        title: above the map.
        label: of the colour bar.
        kind: of the map.
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
    """Keep what a slide's pictures are drawn from.

    Args:
        folder: the slide's.
        thumbnail_YX3: (Y, X, 3) RGB.
        values_MYX: (M, Y, X) the maps, NaN for background.
        pictures: M, in the maps' order.
        um_per_px: µm per thumbnail pixel.

    Raises:
        OSError: the file cannot be written.
    """
    limits_M2 = np.array([colour_limit(values, one.kind) for values, one in zip(values_MYX, pictures, strict=True)])
    told = json.dumps([asdict(picture) for picture in pictures])
    with replacing(folder / KEPT_MAPS) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, thumbnail=thumbnail_YX3, values=values_MYX, limits=limits_M2, pictures=told, um_per_px=um_per_px
        )


def draw_on_one_scale(folders: Iterable[Path]) -> None:
    """Draw the pictures of slides anew, each map on the widest scale that its class has on any of them.

    Args:
        folders: the slides'; those without kept maps stay as they are.

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
    return [Picture(**told) for told in json.loads(str(maps["pictures"]))]
