"""The contenders of bench/cpu/explanation_speed.py: CDAM, and graphs through which autograd computes the same maps.

One forward builds a graph, which then explains classes one by one with a backward each: S from the gradient at the last
block's first norm. K classes thus take one forward and K backwards.

Dimension key: T packed tokens of one image, C channels, M maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from maskattn.explain import CDAM, IntegratedCDAM, SmoothCDAM
from maskattn.explain.token_scores import score_tokens_in_closed_form
from maskattn.nn import VisionTransformer
from maskattn.nn.packed_tokens import PackedTokens

__all__ = [
    "PATCH_PX",
    "Contender",
    "ExplainClass",
    "Repeated",
    "block_graph",
    "contenders",
    "explain_each",
    "graphs",
    "new_model",
    "row_graph",
    "whole_graph",
]

PATCH_PX = 2


class ExplainClass(Protocol):
    """A function that computes the map (T,) of a class by one backward; ``keep_graph`` keeps the graph for another."""

    def __call__(self, c: int, *, keep_graph: bool) -> Tensor:
        """Explain class ``c``."""


@dataclass(frozen=True)
class Repeated:
    """The work that a contender repeats.

    Attributes:
        graph: name of the graph in :func:`graphs`.
        forwards, backwards: numbers of forwards and backwards.
    """

    graph: str
    forwards: int
    backwards: int


@dataclass(frozen=True)
class Contender:
    """A way to explain some classes.

    Attributes:
        name: name in the table.
        classes: number of classes that it explains.
        call: function that does all of its work.
        repeated: the unit that this work repeats; None if it repeats nothing.
    """

    name: str
    classes: int
    call: Callable[[], object]
    repeated: Repeated | None = None


def new_model(classes: int, width: int, depth: int, side: int, device: str) -> VisionTransformer:
    """Build a class-token ViT with heads of 64 channels."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=side * PATCH_PX,
        patch_size=PATCH_PX,
        in_chans=1,
        num_classes=classes,
        embed_dim=width,
        depth=depth,
        num_heads=width // 64,
    )
    return model.to(device).eval()


def whole_graph(model: VisionTransformer, x: Tensor) -> ExplainClass:
    """Build a graph through the whole model, with a hook for the gradient at the norm, as the authors' code does."""
    seen: list[Tensor] = []

    def keep_gradient(module: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    hook = model.last_block.norm1.register_forward_hook(keep_gradient)
    try:
        logits = model(x)
    finally:
        hook.remove()

    def explain(c: int, *, keep_graph: bool) -> Tensor:
        seen[0].grad = None
        logits[:, c].sum().backward(retain_graph=keep_graph)
        gradient = seen[0].grad
        assert gradient is not None
        model.zero_grad()
        return (seen[0].detach() * gradient).sum(dim=1)

    return explain


def block_graph(model: VisionTransformer, tokens: PackedTokens) -> ExplainClass:
    """Build a graph through the complete last block."""
    normed = model.last_block.norm1(tokens.rows_TC).detach().requires_grad_()
    return _explain_at(normed, model.pool(model.last_block.mix(tokens, normed)))


def row_graph(model: VisionTransformer, tokens: PackedTokens) -> ExplainClass:
    """Build the graph of CDAM's tail, through keys, values and the class token's attention row."""
    block = model.last_block
    normed = block.norm1(tokens.rows_TC).detach().requires_grad_()
    read = block.read_attention(tokens, normed)
    return _explain_at(normed, model.predict_from_class_token(block.finish(tokens, read.out_B1HD)))


def _explain_at(normed_TC: Tensor, logits_1K: Tensor) -> ExplainClass:
    def explain(c: int, *, keep_graph: bool) -> Tensor:
        (gradient,) = torch.autograd.grad(logits_1K[:, c].sum(), normed_TC, retain_graph=keep_graph)
        return (normed_TC.detach() * gradient).sum(dim=1)

    return explain


def explain_each(explain: ExplainClass, classes: Sequence[int]) -> Tensor:
    """Compute the maps (M, T) of some classes, with a backward for each."""
    first = explain(classes[0], keep_graph=len(classes) > 1)
    # Maps are written in place, since small tensors between large ones would make the heap grow with every class.
    maps_MT = first.new_empty(len(classes), len(first))
    maps_MT[0] = first
    for row, c in enumerate(classes[1:], start=1):
        maps_MT[row] = explain(c, keep_graph=row + 1 < len(classes))
    return maps_MT


def graphs(model: VisionTransformer, x: Tensor) -> dict[str, Callable[[], ExplainClass]]:
    """Return the forwards that build a graph, by name."""
    tokens = _tokens(model, x)
    return {
        "whole model": lambda: whole_graph(model, x),
        "last block": lambda: block_graph(model, tokens),
        "one row": lambda: row_graph(model, tokens),
    }


def contenders(model: VisionTransformer, x: Tensor, class_counts: Sequence[int], m: int) -> list[Contender]:
    """Return the contenders that explain several classes, for every number of classes, then those that explain one."""
    tokens, build = _tokens(model, x), graphs(model, x)
    found = []

    def by_graph(name: str, graph: str, K: int) -> Contender:
        return Contender(name, K, lambda: explain_each(build[graph](), range(K)), Repeated(graph, 1, K))

    for K in class_counts:
        classes = list(range(K))
        found += [
            Contender("closed form", K, lambda c=classes: score_tokens_in_closed_form(model, tokens, c)),
            by_graph("autograd, one row", "one row", K),
            by_graph("autograd, block", "last block", K),
            Contender("CDAM", K, lambda c=classes: CDAM(model).attribute(x, c)),
            by_graph("backward a class", "whole model", K),
        ]
    size = max(1, min(m, 2**17 // tokens.packing.num_tokens))
    return [
        *found,
        Contender("Smooth", 1, lambda: SmoothCDAM(model, m, internal_batch_size=size).attribute(x, 0)),
        Contender("Integrated", 1, lambda: IntegratedCDAM(model, m, internal_batch_size=size).attribute(x, 0)),
        Contender(
            f"{m} full passes",
            1,
            lambda: [explain_each(build["whole model"](), [0]) for _ in range(m)],
            Repeated("whole model", m, m),
        ),
    ]


@torch.no_grad()
def _tokens(model: VisionTransformer, x: Tensor) -> PackedTokens:
    """Return the tokens that tails start from; their values do not affect the time."""
    return model.embed(x)
