"""The tissue mask of a slide, whether it was found, read from a file or outlined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskattn.shapes import Bool, Float
from maskattn.slide.reader import SlideInfo

__all__ = ["TissueMask", "mask_of_slide"]


@dataclass(frozen=True, eq=False)
class TissueMask:
    """The tissue of a slide as a mask that covers the slide exactly, corner to corner.

    Attributes:
        mask_HW: (H, W) bool, True = tissue.
        spacing_um: µm per mask pixel, the mean of both axes.
        px_lv0: width and height of a mask pixel in level-0 pixels.
        method: how it was made: "optical density", "file" or "outlines", with the names of files that limit it.
        tissue_fraction: the share of the slide that is tissue, 0 to 1.
        notes: sentences for the user, e.g. that no tissue was found.
    """

    mask_HW: Bool[np.ndarray, "H W"]
    spacing_um: float
    px_lv0: tuple[float, float]
    method: str
    tissue_fraction: float
    notes: tuple[str, ...] = ()

    def token_fractions(
        self, x_lv0: float, y_lv0: float, token_lv0: float, shape: tuple[int, int]
    ) -> Float[np.ndarray, "R C"]:
        """Return the share of each token's area that is tissue, 0 to 1.

        Args:
            x_lv0: left edge of the lattice of tokens in level-0 pixels.
            y_lv0: upper edge of the lattice in level-0 pixels.
            token_lv0: side of a token in level-0 pixels.
            shape: (R, C), rows and columns of tokens.

        Raises:
            ImportError: the C++ extension was not built.
        """
        try:
            from maskattn._native import token_coverage
        except ModuleNotFoundError as error:
            raise ImportError(
                "the token grid needs the C++ extension maskattn._native, which was not built; install a C++17 "
                "compiler (Debian: `apt install g++`) and run `pip install --force-reinstall --no-deps .` in "
                "maskattn's source"
            ) from error
        return token_coverage(self.mask_HW, *self.px_lv0, x_lv0, y_lv0, token_lv0, token_lv0, *shape)


def mask_of_slide(mask_HW: Bool[np.ndarray, "H W"], info: SlideInfo, method: str, notes: Sequence[str]) -> TissueMask:
    """Build a :class:`TissueMask` from a mask of the whole slide, with a note if hardly any glass is left.

    Args:
        mask_HW: (H, W) bool over the whole slide.
        info: the slide.
        method: how the mask was made.
        notes: the notes so far.
    """
    height, width = mask_HW.shape
    px_lv0 = (info.width_px / width, info.height_px / height)
    fraction = float(mask_HW.mean())
    if fraction > 0.98:
        notes = [*notes, f"{fraction:.1%} of the slide is tissue: there is hardly any glass"]
    return TissueMask(
        mask_HW=np.ascontiguousarray(mask_HW, dtype=bool),
        spacing_um=info.spacing_um * (px_lv0[0] + px_lv0[1]) / 2,
        px_lv0=px_lv0,
        method=method,
        tissue_fraction=fraction,
        notes=tuple(notes),
    )
