"""CDAM and its variants as the ``explain_func`` of Quantus, which evaluates maps at pixel resolution.

Dimension key: B images, X·Y pixels, H·W grid tokens, p pixels of a token's side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.explain.cdam import CDAM
from maskattn.explain.packed_model import packed_model
from maskattn.shapes import Bool, Float

__all__ = ["explain_for_quantus"]


def explain_for_quantus(
    model: nn.Module,
    inputs: Float[np.ndarray, "B I X Y"] | Tensor,
    targets: Any,
    *,
    method: Callable[..., Any] = CDAM,
    keep: Bool[Tensor, "..."] | None = None,
    **options: Any,
) -> Float[np.ndarray, "B 1 X Y"]:
    """Compute maps at pixel resolution for Quantus: ``explain_func=explain_for_quantus``.

    The model is converted anew in each call, since Quantus changes its weights between calls.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        inputs: (B, in_chans, X, Y) images.
        targets: (B,) class indices.
        method: class of the explanation, :class:`CDAM`, :class:`SmoothCDAM` or :class:`IntegratedCDAM`; called as
            method(model).
        keep: (B, N) or (B, H, W) bool over grid tokens; None keeps all.
        options: further arguments of Quantus (``device``), ignored; the model's own device is used.

    Returns:
        (B, 1, X, Y): the value of a pixel is that of its token; 0 beyond the last complete token.

    Raises:
        TypeError, ValueError: the model cannot be explained, or inputs or targets do not fit it.
    """
    vit = packed_model(model)
    like = next(vit.parameters())
    images = torch.as_tensor(inputs).to(like)
    classes = torch.as_tensor(targets, device=like.device).long()
    maps_BHW = method(vit).attribute(images, classes, keep)
    p, (height, width) = vit.patch_embed.patch_size, images.shape[2:]
    pixels = maps_BHW.repeat_interleave(p, 1).repeat_interleave(p, 2)
    pixels = F.pad(pixels, (0, width - pixels.shape[2], 0, height - pixels.shape[1]))
    return pixels[:, None].detach().cpu().numpy()
