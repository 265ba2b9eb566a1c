"""Maps at pixel resolution, from one function, as toolkits that evaluate explanations expect.

Quantus calls ``explain_func(model=…, inputs=…, targets=…, **explain_func_kwargs)`` with arrays and expects an array of
the inputs' height and width.

Dimension key: B images, I channels, X·Y px.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.explain.cdam import CDAM
from maskattn.shapes import Float

__all__ = ["explain_pixels"]


def explain_pixels(
    model: nn.Module,
    inputs: Float[np.ndarray, "B I X Y"] | Float[Tensor, "B I X Y"],
    targets: int | np.ndarray | Tensor,
    *,
    method: Any = CDAM,
    method_options: dict[str, Any] | None = None,
    device: object = None,
    **attribute_options: Any,
) -> Float[np.ndarray, "B 1 X Y"]:
    """Compute one map for each image, in which every pixel holds its token's relevance divided by the token's area.

    The sum over pixels equals the sum over tokens, so that toolkits that add up relevance see the same total.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        inputs: (B, in_chans, X, Y) images.
        targets: a class index, or (B,) with one for each image.
        method: a class with the interface of :class:`CDAM`.
        method_options: options of the class (``m``, ``path``).
        device: passed by Quantus and ignored; the model's own device is used.
        attribute_options: options of ``attribute`` (``keep``, ``generator``).

    Raises:
        TypeError, ValueError: the arguments do not fit the model.
    """
    x = torch.as_tensor(inputs)
    first = next(model.parameters())
    x = x.to(first.device, first.dtype)
    target = targets if isinstance(targets, int) else torch.as_tensor(targets).long()
    maps = method(model, **(method_options or {})).attribute(x, target, **attribute_options)
    px = x.shape[2] // maps.shape[1], x.shape[3] // maps.shape[2]
    pixels = F.interpolate(maps[:, None], scale_factor=px, mode="nearest") / (px[0] * px[1])
    return pixels.cpu().numpy()
