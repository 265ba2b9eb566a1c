"""Means of the numbers in an array that leave out NaN, as the coarser levels of a map's pyramid have them."""

from __future__ import annotations

import numpy as np

from maskattn.shapes import Float

__all__ = ["halved", "mean_of_known"]


def halved(values_YX: Float[np.ndarray, "Y X"]) -> Float[np.ndarray, "y x"]:
    """The mean of each 2 × 2 pixels over those that are numbers; NaN where none is."""
    rows, columns = ((size + 1) // 2 for size in values_YX.shape)
    padded = np.full((2 * rows, 2 * columns), np.nan, np.float32)
    padded[: values_YX.shape[0], : values_YX.shape[1]] = values_YX
    return mean_of_known(padded.reshape(rows, 2, columns, 2), axes=(1, 3))


def mean_of_known(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The float32 mean along axes over what is a number; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=axes, dtype=np.float32)
    total = np.where(known, values, np.float32(0)).sum(axis=axes)
    mean: np.ndarray = np.divide(total, count, out=np.full(count.shape, np.nan, np.float32), where=count > 0)
    return mean
