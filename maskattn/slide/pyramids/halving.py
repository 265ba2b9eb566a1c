"""Compute means that ignore NaN, for the coarser levels of a map's pyramid."""

from __future__ import annotations

import numpy as np

from maskattn.shapes import Float

__all__ = ["halved", "mean_of_known"]


def halved(values_YX: Float[np.ndarray, "Y X"]) -> Float[np.ndarray, "y x"]:
    """Return the mean of each 2 × 2 pixels over the finite ones; NaN if none is finite."""
    rows, columns = ((size + 1) // 2 for size in values_YX.shape)
    padded = np.full((2 * rows, 2 * columns), np.nan, np.float32)
    padded[: values_YX.shape[0], : values_YX.shape[1]] = values_YX
    return mean_of_known(padded.reshape(rows, 2, columns, 2), axes=(1, 3))


def mean_of_known(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the float32 mean of the finite values along axes; NaN if none is finite."""
    known = np.isfinite(values)
    count = known.sum(axis=axes, dtype=np.float32)
    total = np.where(known, values, np.float32(0)).sum(axis=axes)
    mean: np.ndarray = np.divide(total, count, out=np.full(count.shape, np.nan, np.float32), where=count > 0)
    return mean
