"""Types of the C++ extension built from csrc/."""

import numpy as np
from numpy.typing import NDArray

def token_coverage(
    mask: NDArray[np.bool_] | NDArray[np.uint8],
    px_lv0_x: float,
    px_lv0_y: float,
    origin_x_lv0: float,
    origin_y_lv0: float,
    token_w_lv0: float,
    token_h_lv0: float,
    rows: int,
    cols: int,
    threads: int = 0,
) -> NDArray[np.float32]:
    """Area-weighted tissue fraction of each token of a lattice, (rows, cols) float32 in [0, 1].

    Args:
        mask: (Hm, Wm) bool or uint8, C-contiguous; anything but 0 is tissue. Its corner lies at level-0 (0, 0).
        px_lv0_x: width of a mask pixel in level-0 pixels.
        px_lv0_y: height of a mask pixel in level-0 pixels.
        origin_x_lv0: left edge of the lattice in level-0 pixels.
        origin_y_lv0: top edge of the lattice in level-0 pixels.
        token_w_lv0: width of a token in level-0 pixels, fractions allowed.
        token_h_lv0: height of a token in level-0 pixels, fractions allowed.
        rows: tokens from top to bottom.
        cols: tokens from left to right.
        threads: how many threads; 0 for one per core.

    Raises:
        TypeError: the mask is not a bool or uint8 numpy array, or a number is of the wrong type.
        ValueError: the mask is not a C-contiguous plane, or a size, position or count is out of range.
    """
