"""Read the whole slide at a coarse spacing, as a view for finding tissue."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from maskattn.shapes import UInt8
from maskattn.slide.reader import SlideReader

__all__ = ["VIEW_UM", "CoarseView", "read_view"]

VIEW_UM = 8.0
"""µm per pixel of the view on which tissue is sought unless another spacing is given."""

_MAX_VIEW_PX = 32 << 20


@dataclass(frozen=True, eq=False)
class CoarseView:
    """A view of the whole slide.

    Attributes:
        rgb_HW3: (H, W, 3) uint8 RGB.
        px_um: µm per pixel, the mean of both axes.
        notes: sentences for the user if the view is coarser than requested, or regions could not be read.
    """

    rgb_HW3: UInt8[np.ndarray, "H W 3"]
    px_um: float
    notes: tuple[str, ...]


def read_view(reader: SlideReader, spacing_um: float) -> CoarseView:
    """Read the whole slide at about ``spacing_um`` µm per pixel, or at its own spacing if that is coarser.

    Raises:
        SlideError: the slide has no plausible spacing, or cannot be read.
    """
    info = reader.info
    shrink = max(1.0, spacing_um / info.spacing_um)
    notes = []
    if info.width_px * info.height_px / shrink**2 > _MAX_VIEW_PX:
        shrink = math.sqrt(info.width_px * info.height_px / _MAX_VIEW_PX)
        notes.append(f"tissue was sought at {shrink * info.spacing_um:.3g} µm per pixel, to bound the memory")
    size = (max(1, round(info.width_px / shrink)), max(1, round(info.height_px / shrink)))
    rgb_HW3 = reader.read_region(0, 0, (info.width_px, info.height_px), size, tolerant=True)
    notes.extend(reader.notes)
    px_um = info.spacing_um * (info.width_px / size[0] + info.height_px / size[1]) / 2
    return CoarseView(rgb_HW3, px_um, tuple(notes))
