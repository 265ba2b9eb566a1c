"""The model that an explanation reads: ours as it is, timm's and transformers' converted."""

from __future__ import annotations

import copy

from torch import nn

from maskattn.nn.adapters import from_timm, from_transformers
from maskattn.nn.blocks import Attention, DropPath
from maskattn.nn.vit import VisionTransformer

__all__ = ["packed_model", "refuse_dropout", "without_head"]


def packed_model(model: nn.Module) -> VisionTransformer:
    """A packed vision transformer with the outputs of the given model.

    Ours is returned itself. Others are converted once, in eval mode, with copies of their weights: what is done to the
    model afterwards is not seen.

    Args:
        model: :class:`maskattn.nn.VisionTransformer`, or a vision transformer of timm or transformers.

    Raises:
        TypeError: it is another kind of model.
        ValueError: it has parts that ours has not; they are named.
    """
    if isinstance(model, VisionTransformer):
        return model
    libraries = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    for library, convert in (("timm", from_timm), ("transformers", from_transformers)):
        if library in libraries:
            was_training = model.training
            try:
                return convert(model.eval())
            finally:
                model.train(was_training)
    raise TypeError(
        "an explanation takes a maskattn.nn.VisionTransformer, or a vision transformer of timm or transformers, got "
        f"{type(model).__name__}; load its weights into one of these (maskattn.nn.checkpoints), and use "
        "HierarchicalCDAM for a SlideModel, ThreeLevelCDAM for a HIPT"
    )


def refuse_dropout(model: nn.Module) -> None:
    """Refuse a model that would drop at random while it is explained: its map would be that of another model.

    Raises:
        ValueError: some of its parts drop; the first is named.
    """
    for name, part in model.named_modules():
        share = part.p if isinstance(part, nn.Dropout) else part.share if isinstance(part, DropPath) else 0
        if isinstance(part, Attention):
            share = part.dropout_p
        if part.training and share > 0:
            raise ValueError(f"a model must be in eval mode to be explained, got one whose {name} drops; call eval()")


def without_head(model: VisionTransformer) -> VisionTransformer:
    """The same model, weights shared, whose output is what its head would read."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "head": nn.Identity()}
    twin.num_classes = 0
    return twin
