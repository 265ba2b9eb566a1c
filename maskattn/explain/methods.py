"""The registry of explanation methods, which the command line, the benchmarks and the documentation share.

This module does not import torch, so that help and completion are fast; a method's class is imported on first use.
To add a method, write a subclass of :class:`maskattn.explain.explainer.Explainer` and add an entry below.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from maskattn.explain.explainer import Explainer

__all__ = ["DEFAULT_METHOD", "METHODS", "Method", "method_named"]


@dataclass(frozen=True)
class Method:
    """A method of explanation.

    Attributes:
        name: the name on the command line.
        title: the name in tables, pictures and files.
        what: a clause that describes the value of a token in its map.
        module, kind: module and name of the class, a subclass of ``Explainer``.
        options: options of the class that this method sets.
        compared: whether the method is only there for comparison.
        draws: whether its maps depend on random numbers.
        complete: whether its map sums to a difference of scores, up to a gap that it reports.
        levels: whether it also explains slide models, at each of their levels.
    """

    name: str
    title: str
    what: str
    module: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    compared: bool = False
    draws: bool = False
    complete: bool = False
    levels: bool = False

    @property
    def class_token_alone(self) -> bool:
        """Whether the method explains only class-token models."""
        return self.module == _ROW

    def __call__(self, model: nn.Module, **options: Any) -> Explainer:
        """Build the explainer of a model; ``options`` of the class override the method's own."""
        explainer: Explainer = getattr(importlib.import_module(self.module), self.kind)(
            model, **{**self.options, **options}
        )
        return explainer


_ATTENTION, _BASELINES = "maskattn.explain.attention_baselines", "maskattn.explain.baselines"
_ROW = "maskattn.explain.attention_row"
_LIST = (
    Method(
        "cdam",
        "CDAM",
        "token times gradient at the last attention's input",
        "maskattn.explain.cdam",
        "CDAM",
        levels=True,
    ),
    Method(
        "smooth",
        "Smooth CDAM",
        "the mean of CDAM over 50 noisy copies",
        "maskattn.explain.smooth",
        "SmoothCDAM",
        draws=True,
    ),
    Method(
        "integrated",
        "Integrated CDAM, input",
        "the mean of CDAM over 50 scales of the last block's input, the authors' path",
        "maskattn.explain.integrated",
        "IntegratedCDAM",
    ),
    Method(
        "integrated-norm",
        "Integrated CDAM, norm",
        "Integrated Gradients at the last attention's input, complete",
        "maskattn.explain.integrated",
        "IntegratedCDAM",
        {"path": "norm", "m": 8},
        complete=True,
        levels=True,
    ),
    Method(
        "integrated-weights",
        "Integrated CDAM, weights",
        "the same path, attributing changes of attention weights instead of scores, complete",
        "maskattn.explain.integrated",
        "IntegratedCDAM",
        {"path": "weights", "m": 8},
        complete=True,
        levels=True,
    ),
    Method(
        "integrated-value",
        "Integrated CDAM, value",
        "Integrated Gradients of the values in the last attention, its weights held fixed, complete",
        "maskattn.explain.integrated",
        "IntegratedCDAM",
        {"path": "value", "m": 8},
        complete=True,
        levels=True,
    ),
    Method(
        "row-ablation",
        "row ablation",
        "the exact loss of score when the token is dropped from the last attention row",
        _ROW,
        "AttentionRowAblation",
    ),
    Method(
        "row-ablation-linear",
        "row ablation, first order",
        "the same loss, to first order in the class token's attention output",
        _ROW,
        "AttentionRowAblation",
        {"first_order": True},
    ),
    Method(
        "attention",
        "attention",
        "the class token's attention in the last block",
        _ATTENTION,
        "AttentionRow",
        compared=True,
    ),
    Method(
        "rollout",
        "rollout",
        "attention multiplied through the blocks",
        _ATTENTION,
        "AttentionRollout",
        compared=True,
    ),
    Method(
        "relevance-propagation",
        "relevance propagation",
        "attention times its gradient, summed through the blocks",
        _ATTENTION,
        "RelevancePropagation",
        compared=True,
    ),
    Method(
        "input-x-gradient",
        "Input×Gradient",
        "pixels times their gradients",
        _BASELINES,
        "InputXGradient",
        compared=True,
    ),
    Method(
        "integrated-gradients",
        "Integrated Gradients",
        "Integrated Gradients of the pixels from a zero image, 50 steps",
        _BASELINES,
        "IntegratedGradients",
        compared=True,
    ),
    Method(
        "smoothgrad",
        "SmoothGrad",
        "pixels times their mean gradient over 50 noisy images",
        _BASELINES,
        "SmoothGrad",
        compared=True,
        draws=True,
    ),
    Method(
        "rise",
        "RISE",
        "the mean of random occluding masks, weighted by the score",
        _BASELINES,
        "RISE",
        compared=True,
        draws=True,
    ),
    Method(
        "token-ablation",
        "token ablation",
        "the loss of score when the token is dropped, one prediction for each token",
        _BASELINES,
        "TokenAblation",
        compared=True,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _LIST}
DEFAULT_METHOD = "integrated-weights"


def method_named(name: str, levels: bool = False) -> Method:
    """Look up a method by its name.

    Args:
        name: the method's name.
        levels: whether it has to explain slide models.

    Raises:
        ValueError: there is no such method.
    """
    known = [method.name for method in METHODS.values() if method.levels or not levels]
    if name not in known:
        of = " of a slide model" if levels else ""
        raise ValueError(f"method{of} must be one of {', '.join(known)}, got method={name!r}")
    return METHODS[name]
