"""The names of torchvision's compiled operators, for where a torchvision is installed that another torch was built for.

Such a torchvision fails to import, and timm and torchmetrics with it, since torch does not know its operators. Nothing
here or there runs them: their names are all that an import takes.
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
    """Make the names known to torch that it does not know; they go with the library that is returned."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library
