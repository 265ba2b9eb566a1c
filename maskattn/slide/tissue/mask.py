"""The tissue mask that finding and the user's own file both give, as grids and pictures take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskattn.shapes import Bool, Float
from maskattn.slide.reader import SlideInfo

__all__ = ["TissueMask", "mask_of_slide"]


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Which parts of a slide are tissue. The mask covers the slide exactly: its corners are the slide's.

    Attributes:
        mask_HW: (H, W) bool, True = tissue.
        spacing_um: µm per mask pixel, the mean of both axes.
        px_lv0: width and height of a mask pixel in level-0 pixels.
        method: how it was made: "optical density", "file" or "outlines".
        tissue_fraction: tissue pixels / all pixels.
        notes: what the user should know of it, e.g. that no tissue was found.
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
        """The share of each token's area that is tissue.

        Args:
            x_lv0: left edge of the lattice of tokens in level-0 pixels.
            y_lv0: its upper edge.
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
    """The mask with its geometry, and a note where hardly any glass is left.

    Args:
        mask_HW: (H, W) bool over all of the slide.
        info: the slide.
        method: how the mask was made.
        notes: what is known of it already.
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
