"""The slide models that can be trained, by their names in the settings."""

from __future__ import annotations

import torch
from torch import nn

from maskattn.nn.slide_models.gated_attention import GatedAttentionHead
from maskattn.nn.slide_models.head import SlideHead
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.nn.slide_models.ordinal import OrdinalHead
from maskattn.nn.slide_models.pooling import PooledHead
from maskattn.nn.slide_models.transmil import TransMILHead
from maskattn.nn.slide_models.vit import ViTHead
from maskattn.nn.vit import VisionTransformer
from maskattn.training.settings import TrainSettings
from maskattn.training.tasks import ValueTask

__all__ = ["build_head", "in_units_of"]

_CHANNELS_PER_HEAD = 64


def build_head(settings: TrainSettings, in_dim: int, num_classes: int) -> SlideHead:
    """Build a slide model with random weights from torch's default generator.

    Args:
        settings: the model's name and size.
        in_dim: C, the width of the features.
        num_classes: K; 1 for regression and survival.

    Raises:
        ValueError: the sizes do not fit each other.
    """
    if settings.task == "ordinal":
        return OrdinalHead(_plain_head(settings, in_dim, num_classes - 1))
    return _plain_head(settings, in_dim, num_classes)


def _plain_head(settings: TrainSettings, in_dim: int, outputs: int) -> SlideHead:
    name, width, dropout = settings.model, settings.width, settings.dropout
    if name in ("mean", "max"):
        return PooledHead(in_dim, outputs, name, () if width is None else (width,), dropout)
    if name in ("abmil", "clam"):
        hidden = width or 512
        clusters = name == "clam" and settings.task in ("binary", "multiclass")
        return GatedAttentionHead(in_dim, outputs, hidden, max(1, hidden // 2), instances=clusters, dropout=dropout)
    if name == "transmil":
        return TransMILHead(in_dim, outputs, width or 512)
    if name == "hipt":
        dim = width or 192
        return HIPTHead(in_dim, outputs, dim, settings.heads or _heads(dim), settings.depth, dropout, settings.impl)
    dim = width or 192
    vit = VisionTransformer(
        img_size=16,
        patch_size=1,
        in_chans=in_dim,
        num_classes=outputs,
        embed_dim=dim,
        depth=settings.depth,
        num_heads=settings.heads or _heads(dim),
        pos_embed=settings.positions,
        drop_rate=dropout,
        proj_drop_rate=dropout,
        norm_eps=1e-5,
        impl=settings.impl,
    )
    _start_class_token(vit)
    return ViTHead(vit)


@torch.no_grad()
def _start_class_token(vit: VisionTransformer) -> None:
    """Draw the class token from a standard normal distribution, as TransMIL and STAMP do.

    timm's first value of about 1e-6 is below the ε of LayerNorm: without positions, the token then has no query of its
    own in the first block, and a later norm magnifies the small random sums that it has by then.
    """
    assert vit.cls_token is not None, "a slide model is read at its class token"
    nn.init.normal_(vit.cls_token)


def _heads(dim: int) -> int:
    """Return the default number of heads: one per 64 channels, reduced to a divisor of the width."""
    return next(heads for heads in range(max(1, dim // _CHANNELS_PER_HEAD), 0, -1) if dim % heads == 0)


@torch.no_grad()
def in_units_of(head: SlideHead, task: ValueTask) -> None:
    """Scale the last layer of a head that was trained on standardised values, so that it predicts the values."""
    for layer in _last_layers(head):
        layer.weight.mul_(task.std)
        layer.bias.mul_(task.std).add_(task.mean)


def _last_layers(head: SlideHead) -> list[nn.Linear]:
    if isinstance(head, PooledHead):
        found = [head.mlp[-1]]
    elif isinstance(head, GatedAttentionHead):
        found = list(head.classifiers) if isinstance(head.classifiers, nn.ModuleList) else [head.classifiers]
    elif isinstance(head, TransMILHead):
        found = [head._fc2]
    elif isinstance(head, HIPTHead):
        found = [head.classifier]
    else:
        assert isinstance(head, ViTHead), f"no training makes a {head.kind} head"
        found = [head.vit.head]
    assert all(isinstance(layer, nn.Linear) for layer in found), "every head ends in a linear layer"
    return found  # type: ignore[return-value]  # as was just asserted
