"""Pictures of the evidence: images and the maps of every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["draw_maps", "lay_over"]


def lay_over(axis: object, image_YX: np.ndarray, map_HW: np.ndarray, signed: bool) -> None:
    """Draw a map over a pale grey image, clipped to its 0.1 and 99.9 % quantiles, symmetric about 0 if signed."""
    height, width = image_YX.shape[:2]
    axis.imshow(image_YX, cmap="gray", extent=(0, width, height, 0))
    low, high = np.quantile(map_HW, (0.001, 0.999))
    limit = max(abs(low), abs(high)) or 1.0
    limits = (
        {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis", "vmin": 0, "vmax": high}
    )
    axis.imshow(map_HW, extent=(0, width, height, 0), alpha=0.7, interpolation="nearest", **limits)


def draw_maps(images_BXY: np.ndarray, classes_B2: Sequence[Sequence[int]], maps: dict[str, Tensor], path: Path) -> None:
    """Draw a row for each image and class and a column for each method; red supports the class, blue opposes it."""
    names = list(maps)
    count = 2 * len(images_BXY)
    figure = Figure(figsize=(1.35 * (len(names) + 1), 1.0 * count + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(names) + 1, squeeze=False)
    for row in range(count):
        image, which = divmod(row, 2)
        axes[row, 0].imshow(images_BXY[image], cmap="gray")
        axes[row, 0].set_ylabel(f"for {classes_B2[image][which]}", fontsize=8)
        for axis, name in zip(axes[row, 1:], names, strict=True):
            values = maps[name][image, which].numpy()
            lay_over(axis, images_BXY[image], values, bool((values < 0).any()))
    for axis, name in zip(axes[0], ["image", *names], strict=True):
        axis.set_title(name.replace(", ", ",\n").replace(" ", "\n", 1), fontsize=7)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
