"""The model that an explanation reads: this package's own as it is, those of timm and transformers converted."""

from __future__ import annotations

import copy

from torch import nn

from maskattn.nn.adapters import from_timm, from_transformers
from maskattn.nn.blocks import Attention, DropPath
from maskattn.nn.plain_modules import is_plain
from maskattn.nn.vit import VisionTransformer

__all__ = ["check_explainable", "packed_model", "without_head"]


def packed_model(model: nn.Module) -> VisionTransformer:
    """Return a packed vision transformer with the outputs of the given model.

    This package's own model is returned itself. Others are converted once, in eval mode, with copies of their weights,
    so later changes to the original have no effect.

    Args:
        model: :class:`maskattn.nn.VisionTransformer`, or a vision transformer of timm or transformers.

    Raises:
        TypeError: the model is of another kind.
        ValueError: the model has modules that this package's model lacks; the error names them.
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
    """Refuse a model for which the map would not explain its actual prediction.

    Explanations run a vision transformer's blocks, norm and head, but not its own forward.

    Raises:
        ValueError: dropout is active (train mode), or a vision transformer's forward has been replaced, patched or
            hooked; the error names the first such module.
    """
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer) and not is_plain(
            module, {type(module): VisionTransformer.forward}, itself=True
        ):
            raise ValueError(
                "an explanation runs a vision transformer's modules, not its forward, which must therefore be "
                f"unmodified, got {name or 'the model'}, a {type(module).__name__}, with hooks or another forward; "
                "remove them, or put what they do into a target function"
            )
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else module.share if isinstance(module, DropPath) else 0
        if isinstance(module, Attention):
            rate = module.dropout_p
        if module.training and rate > 0:
            raise ValueError(
                f"a model must be in eval mode to be explained, got one whose {name} has active dropout; call eval()"
            )


def without_head(model: VisionTransformer) -> VisionTransformer:
    """Return the same model with shared weights whose output is the input of its head."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "head": nn.Identity()}
    twin.num_classes = 0
    return twin
