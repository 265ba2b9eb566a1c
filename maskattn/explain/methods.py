"""The methods of explanation by name: the one list that the command line, the tables and the pages read.

Nothing here imports torch, so that help and completion answer at once; a method's class is imported when it is made.
To add one, write a subclass of :class:`maskattn.explain.explainer.Explainer` and a line below.
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
        name: as it is typed.
        title: in tables, pictures and files.
        what: a clause on what its map says of a token.
        module, kind: of the class, a subclass of ``Explainer``.
        options: of the class, that this name stands for.
        compared: it is there for comparison alone.
        draws: its maps depend on a generator.
        complete: its map sums to a difference of scores, to a gap that it can tell.
        levels: it explains slide models too, at each of their levels.
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
        """Whether it explains class-token models only."""
        return self.module == _ROW

    def __call__(self, model: nn.Module, **options: Any) -> Explainer:
        """The explainer of a model; ``options`` of the class go before the method's own."""
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
        "the same path with the attention told in its weights and not in its scores, complete",
        "maskattn.explain.integrated",
        "IntegratedCDAM",
        {"path": "weights", "m": 8},
        complete=True,
        levels=True,
    ),
    Method(
        "integrated-value",
        "Integrated CDAM, value",
        "Integrated Gradients of the values that the last attention reads, its weights held, complete",
        "maskattn.explain.integrated",
        "IntegratedCDAM",
        {"path": "value", "m": 8},
        complete=True,
        levels=True,
    ),
    Method(
        "row-ablation",
        "row ablation",
        "what the score loses when the token is dropped from the last attention row, exactly",
        _ROW,
        "AttentionRowAblation",
    ),
    Method(
        "row-ablation-linear",
        "row ablation, first order",
        "the same to first order in what the class token reads",
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
        "what the score loses when the token is dropped, a prediction for each",
        _BASELINES,
        "TokenAblation",
        compared=True,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _LIST}
DEFAULT_METHOD = "integrated-norm"


def method_named(name: str, levels: bool = False) -> Method:
    """A method by its name.

    Args:
        name: of the method.
        levels: it has to explain slide models.

    Raises:
        ValueError: there is none of that name.
    """
    known = [method.name for method in METHODS.values() if method.levels or not levels]
    if name not in known:
        of = " of a slide model" if levels else ""
        raise ValueError(f"method{of} must be one of {', '.join(known)}, got method={name!r}")
    return METHODS[name]
