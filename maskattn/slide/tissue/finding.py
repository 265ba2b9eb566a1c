"""Find the tissue on a coarse view of a slide.

The view is converted to optical density over the slide's own glass (``glass.py``); strong, pale and grey stain are
distinguished from glass (``stain.py``); pen strokes are removed by their shape (``ink.py``); gaps are closed, and small
pieces and holes are removed by their area in µm².
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import cv2
import numpy as np

from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue.areas import closed, disc, without_pieces_below
from maskattn.slide.tissue.bright_field import refuse_other_than_bright_field
from maskattn.slide.tissue.glass import measure_stain
from maskattn.slide.tissue.ink import find_ink
from maskattn.slide.tissue.mask import TissueMask, mask_of_slide
from maskattn.slide.tissue.stain import find_stain
from maskattn.slide.tissue.view import VIEW_UM, read_view

__all__ = ["InkRule", "TissueMask", "find_tissue"]

InkRule = Literal["auto", "off"]

_CLOSING_UM = 40.0
# Texture within this distance of tissue is its blurred or frayed edge.
_EDGE_UM = 40.0
# Textured areas that are left out are noted from this share of the slide, and of the tissue found.
_NOTED_SHARE, _NOTED_PER_TISSUE = 0.002, 0.05


def find_tissue(
    reader: SlideReader,
    spacing_um: float = VIEW_UM,
    *,
    min_tissue_um2: float = 8_000.0,
    max_hole_um2: float = 8_000.0,
    ink: InkRule = "auto",
    force: bool = False,
) -> TissueMask:
    """Find the tissue of a stained slide.

    A slide without tissue gives an empty mask, and a note that says what it shows instead. Pen strokes are removed
    with a margin of 24 µm: marks of even colour, long for their width, with much of their outline on glass.

    Args:
        reader: the slide.
        spacing_um: µm per pixel of the view on which tissue is sought; a coarser slide is used at its own spacing.
        min_tissue_um2: smaller pieces of tissue are dropped as dust. Both areas are limited to half of the slide.
        max_hole_um2: smaller holes in the tissue are filled.
        ink: "auto" removes pen strokes, "off" keeps them.
        force: accept a slide that was not scanned in bright field.

    Raises:
        ValueError: ``spacing_um`` is not above 0, or ``ink`` is neither "auto" nor "off".
        SlideError: the slide has no plausible spacing, cannot be read, or was not scanned in bright field.
    """
    if not (math.isfinite(spacing_um) and spacing_um > 0):
        raise ValueError(f"find_tissue needs a spacing above 0, got spacing_um={spacing_um}; 8 to 10 µm serves well")
    if ink not in get_args(InkRule):
        raise ValueError(f'find_tissue takes ink="auto" or ink="off", got ink={ink!r}; "off" keeps what looks like ink')
    view = read_view(reader, spacing_um)
    rgb, px_um = view.rgb_HW3, view.px_um
    forced = refuse_other_than_bright_field(rgb, reader.info.path, force)

    stain = find_stain(measure_stain(rgb, px_um), px_um)
    strokes = np.zeros_like(stain.stained_HW)
    if ink == "auto":
        strokes = find_ink(rgb, stain.stained_HW | stain.opaque_HW, px_um)
    mask = closed(stain.stained_HW & ~strokes, _CLOSING_UM / 2 / px_um)
    mask = without_pieces_below(mask, min(min_tissue_um2 / px_um**2, mask.size / 2))
    mask = ~without_pieces_below(~mask, min(max_hole_um2 / px_um**2, mask.size / 2))
    mask &= ~strokes
    notes = [*view.notes, *forced, *_notes(rgb, mask, strokes, stain.rough_HW, px_um)]
    return mask_of_slide(mask, reader.info, "optical density", notes)


def _notes(rgb: np.ndarray, mask: np.ndarray, strokes: np.ndarray, rough: np.ndarray, px_um: float) -> list[str]:
    """Return notes on what was left out, and on what a slide without tissue shows."""
    notes = []
    if strokes.any():
        notes.append(f"ink was taken out: {strokes.mean():.2%} of the slide; --ink off keeps it")
    near = cv2.dilate((mask | strokes).astype(np.uint8), disc(_EDGE_UM / px_um)) > 0
    left = float((rough & ~near).mean())
    if left >= max(_NOTED_SHARE, _NOTED_PER_TISSUE * mask.mean()):
        notes.append(
            f"{left:.1%} of the slide has texture but was left out, being too pale to tell from glass; if it is "
            "tissue, name it in a mask of your own (--mask)"
        )
    if not mask.any():
        notes.append(f"no tissue was found: {_what_is_there(rgb, strokes, left)}")
    return notes


def _what_is_there(rgb: np.ndarray, strokes: np.ndarray, left: float) -> str:
    if left >= _NOTED_SHARE:
        return "what there is, is too pale"
    if strokes.any():
        return "the slide holds glass and ink alone"
    lowest, highest = rgb.min(axis=(0, 1)), rgb.max(axis=(0, 1))
    if np.array_equal(lowest, highest):
        colour = ", ".join(str(value) for value in lowest)
        return f"the slide is of one flat colour (red, green, blue = {colour}); check that it was exported whole"
    return "the slide is empty, it shows glass alone; check that it is the right one"
