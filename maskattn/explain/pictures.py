"""Figures of explanations: an image, its attention map and its class maps, each with a colour bar.

Values are clipped to the 0.1 and 99.9 % quantiles for display only. pyplot is not used, so there is no global state.

Dimension key: M maps, H·W grid tokens, Y·X px.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from maskattn.lettering import families_of, wrapped
from maskattn.shapes import Bool, Float, Shaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_explanation", "draw_map"]

_PANEL_INCH = 2.9
_COLUMNS = 4
_OPACITY = 0.65
_LUMINANCE = (0.299, 0.587, 0.114)


def draw_explanation(
    image_YX3: Shaped[np.ndarray, "Y X 3"],
    attention_HW: Float[Tensor, "H W"] | None,
    maps: Mapping[str, Float[Tensor, "H W"]],
    title: str = "",
    *,
    keep_HW: Bool[Tensor, "H W"] | None = None,
) -> Figure:
    """Draw the image, its attention map, and a signed map for each class, side by side.

    Args:
        image_YX3: (Y, X, 3) RGB, uint8 or float in [0, 1].
        attention_HW: (H, W), at least 0; None omits the attention panel.
        maps: title → (H, W) signed relevance; red supports the class, blue opposes it.
        title: title of the figure.
        keep_HW: (H, W) bool; background tokens are left uncoloured. None keeps all.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: the image is not (Y, X, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if image_YX3.ndim != 3 or image_YX3.shape[2] != 3:
        raise ValueError(f"the image must be (Y, X, 3) RGB, got shape {image_YX3.shape}")
    count = 1 + (attention_HW is not None) + len(maps)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    aspect = image_YX3.shape[0] / image_YX3.shape[1]
    width = _PANEL_INCH * columns + 0.3
    heading = _lettering(title, width - 0.2, 10)
    lines = 1 + heading["label"].count("\n") if title else 0
    size = (width, (_PANEL_INCH * 0.82 * aspect + 0.45) * rows + (0.18 + 0.17 * lines if title else 0.0))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    axes[0].imshow(image_YX3)
    axes[0].set_title("input", fontsize=9)
    named = {} if attention_HW is None else {"attention": attention_HW}
    for axis, (name, values) in zip(axes[1:], {**named, **maps}.items(), strict=False):
        draw_map(axis, image_YX3, values, signed=name in maps, keep_HW=keep_HW)
        axis.set_title(**_lettering(name, _PANEL_INCH * 0.8, 9))
    for index, axis in enumerate(axes):
        axis.set_axis_off() if index >= count else axis.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(heading.pop("label"), **heading)
    return figure


def _lettering(text: str, width_inch: float, size_pt: float) -> dict[str, Any]:
    """Return the arguments of a title that is wrapped to a width, in fonts that have its characters."""
    lines = wrapped(text, width_inch * 100, size_pt, 100)
    return {
        "label": "\n".join(lines),
        "fontsize": size_pt,
        "fontfamily": families_of("".join(lines)),
        "parse_math": False,
    }


def draw_map(
    axis: Any,
    image_YX3: np.ndarray,
    values_HW: Float[Tensor, "H W"],
    *,
    signed: bool,
    keep_HW: Bool[Tensor, "H W"] | None = None,
) -> None:
    """Draw a map over the grey image, with a colour bar.

    Args:
        axis: a matplotlib axis.
        image_YX3: (Y, X, 3) RGB, uint8 or float in [0, 1].
        values_HW: (H, W), the map.
        signed: whether the map is relevance, on a diverging scale symmetric about 0, or attention, on a scale from 0.
        keep_HW: (H, W) bool; background tokens are left uncoloured. None keeps all.
    """
    height, width = image_YX3.shape[:2]
    extent = (0, width, height, 0)
    grey = image_YX3 @ np.array(_LUMINANCE)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255 if image_YX3.dtype == np.uint8 else 1, extent=extent)
    values = values_HW.detach().double().cpu().numpy()
    low, high = np.quantile(values, (0.001, 0.999))
    limit = max(abs(low), abs(high)) or 1.0
    scale = {"cmap": "RdBu_r", "vmin": -limit} if signed else {"cmap": "viridis", "vmin": 0}
    if keep_HW is not None:
        values = np.ma.masked_array(values, ~keep_HW.cpu().numpy())
    drawn = axis.imshow(values, alpha=_OPACITY, interpolation="nearest", extent=extent, vmax=limit, **scale)
    bar = axis.figure.colorbar(drawn, ax=axis, shrink=0.85, pad=0.02)
    bar.solids.set_alpha(1)
    bar.set_label("relevance (+ for, − against)" if signed else "attention", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
