"""Captum's calling conventions: tuples of inputs, ``additional_forward_args`` and wrapping in ``NoiseTunnel``.

captum is not imported. All that its tools require of a method is here and in :mod:`maskattn.explain.explainer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["as_captum_calls"]

Attribute = TypeVar("Attribute", bound=Callable[..., Any])


def as_captum_calls(attribute: Attribute) -> Attribute:
    """Let ``attribute(inputs, target, keep)`` also take images in a tuple, and ``keep`` as additional_forward_args.

    If the inputs are a tuple, so is the result.
    """

    @functools.wraps(attribute)
    def call(self: Any, inputs: Any, target: Any, keep: Tensor | None = None, **options: Any) -> Any:
        more = options.pop("additional_forward_args", None)
        as_tuple = isinstance(inputs, tuple)
        if as_tuple and len(inputs) != 1:
            raise ValueError(
                f"an explanation takes images as one tensor or a tuple of one, got {len(inputs)}; pass a mask as keep, "
                "or as additional_forward_args"
            )
        more = tuple(x for x in (more if isinstance(more, tuple) else (more,)) if x is not None)
        if len(more) > 1 or (more and keep is not None):
            raise ValueError(
                f"additional_forward_args may only hold the mask keep, once, got {len(more)} of them"
                f"{' in addition to keep' if keep is not None else ''}"
            )
        with torch.inference_mode(False):
            result = attribute(self, inputs[0] if as_tuple else inputs, target, more[0] if more else keep, **options)
        return (result,) if as_tuple else result

    @functools.wraps(call)
    def outer(*arguments: Any, **options: Any) -> Any:
        # captum's NoiseTunnel unwraps one layer, because its own methods have a wrapper that logs usage.
        return call(*arguments, **options)

    return cast(Attribute, outer)
