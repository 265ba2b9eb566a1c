"""The model that an explanation reads: ours as it is, timm's and transformers' converted."""

from __future__ import annotations

import copy

from torch import nn

from maskattn.nn.adapters import from_timm, from_transformers
from maskattn.nn.blocks import Attention, DropPath
from maskattn.nn.plain_modules import is_plain
from maskattn.nn.vit import VisionTransformer

__all__ = ["check_explainable", "packed_model", "without_head"]


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


def check_explainable(model: nn.Module) -> None:
    """Refuse a model whose map would be that of another model.

    Explanations take a vision transformer apart: they run its blocks, norm and head, and not its own forward.

    Raises:
        ValueError: some of its parts drop at random (train mode), or a vision transformer's forward has been replaced,
            patched or hooked; the first is named.
    """
    for name, part in model.named_modules():
        if isinstance(part, VisionTransformer) and not is_plain(
            part, {type(part): VisionTransformer.forward}, itself=True
        ):
            raise ValueError(
                "an explanation runs a vision transformer's parts, so nothing may hang on its own forward, got "
                f"{name or 'the model'}, a {type(part).__name__}, with hooks or another forward; take them off, or put "
                "what they do into a target function"
            )
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
