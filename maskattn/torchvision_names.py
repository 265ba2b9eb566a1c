"""The names of torchvision's compiled operators, for a torchvision that was built for another version of torch.

Importing such a torchvision fails, and timm and torchmetrics with it, since torch does not know its operators. The
operators are not called, so defining their names is enough for the import.
"""

from __future__ import annotations

import torch

__all__ = ["name_operators"]

_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)


def name_operators() -> torch.library.Library:
    """Define the operators that torch does not know; they exist as long as the returned library."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library
