"""CLAM's clustering of instances (Lu et al., Nature BME 2021): tiles of high attention must look like their class.

In a slide of class y, the n tiles of highest attention are labelled positive and the n of lowest attention negative.
The instance classifier of class y is trained on them by cross entropy, in addition to the slide's own loss.

Dimension key: T tiles, D channels of CLAM's first layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.nn.slide_models.gated_attention import GatedAttentionHead
from maskattn.shapes import Float

__all__ = ["clustering_loss"]


def clustering_loss(
    head: GatedAttentionHead, rows_TD: Float[Tensor, "T D"], weights_AT: Float[Tensor, "A T"], label: int, count: int
) -> Float[Tensor, ""]:
    """Compute the loss of a slide's instances.

    Args:
        head: a head with instance classifiers.
        rows_TD, weights_AT: the results of :meth:`GatedAttentionHead.rows_and_weights`.
        label: the index of the slide's class.
        count: n, limited to half of the tiles.

    Returns:
        The mean cross entropy; 0 for fewer than two tiles.
    """
    count = min(count, len(rows_TD) // 2)
    if not count:
        return rows_TD.sum() * 0
    weights_T = weights_AT[label if len(weights_AT) > 1 else 0].detach()
    chosen = torch.cat([weights_T.topk(count).indices, weights_T.topk(count, largest=False).indices])
    truth = torch.cat([chosen.new_ones(count), chosen.new_zeros(count)])
    logits: Tensor = head.instance_classifiers[label](rows_TD[chosen])
    return F.cross_entropy(logits.float(), truth)
