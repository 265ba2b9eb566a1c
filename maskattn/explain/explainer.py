"""The common interface of explanations: ``attribute``, and the request that a method's ``maps`` answers.

A method defines its maps. This module defines how it is called (captum's conventions included), which model and tokens
the target is a function of, where random numbers come from and what the maps hold at background.

Dimension key: B images, M maps, T packed tokens, N = H·W grid tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from maskattn.explain.captum_calls import as_captum_calls
from maskattn.explain.concepts import Concept
from maskattn.explain.packed_model import check_explainable, packed_model, without_head
from maskattn.explain.targets import Target, gives_one_map, select_scores
from maskattn.nn.blocks import PackedTokens
from maskattn.nn.kept_tokens import keep_per_token
from maskattn.nn.vit import VisionTransformer
from maskattn.packing import unpack
from maskattn.shapes import Bool, Float

__all__ = ["Account", "Explainer", "Request", "TokenExplainer", "as_maps", "sum_of_grid"]


@dataclass(frozen=True, eq=False)
class Request:
    """A prediction to explain. Tokens and scores are computed on first use, without a graph.

    Attributes:
        model: the model that the target is a function of, without its head for a concept.
        inputs: (B, in_chans, X, Y) images.
        target: see :func:`maskattn.explain.targets.select_scores`.
        keep: the mask as the caller gave it, or None.
        generator: source of randomness; None is torch's default generator.
    """

    model: VisionTransformer
    inputs: Float[Tensor, "B I X Y"]
    target: Target
    keep: Bool[Tensor, "..."] | None = None
    generator: torch.Generator | None = None

    @cached_property
    def grid_HW(self) -> tuple[int, int]:  # noqa: N802 (a dimension key)
        """Rows and columns of the token grid."""
        return self.model.patch_embed.grid_of(self.inputs)

    @cached_property
    def keep_BN(self) -> Bool[Tensor, "B N"]:  # noqa: N802 (a dimension key)
        """(B, N) bool, the grid tokens that take part."""
        return keep_per_token(self.keep, len(self.inputs), self.grid_HW, self.inputs.device)

    @cached_property
    @torch.no_grad()
    def embedded(self) -> PackedTokens:
        """The first block's input."""
        return self.model.embed(self.inputs, self.keep)

    @cached_property
    @torch.no_grad()
    def tokens(self) -> PackedTokens:
        """The last block's input."""
        return self.model.before_last_block(self.embedded)

    @cached_property
    @torch.no_grad()
    def scores_BM(self) -> Float[Tensor, "B M"]:  # noqa: N802 (a dimension key)
        """(B, M), the scores to explain."""
        return select_scores(self.model.predict(self.tokens), self.target)

    def asking(self, target: Target) -> Request:
        """Return a request for another target of the same model and images, which reuses the backbone's output."""
        other = replace(self, target=target)
        vars(other).update({name: vars(self)[name] for name in ("embedded", "tokens") if name in vars(self)})
        return other


class Explainer(ABC):
    """A method of explanation. A subclass defines its maps; ``attribute`` is the same for all.

    Args:
        model: a :class:`maskattn.nn.VisionTransformer` in eval mode, or a vision transformer of timm or transformers,
            which is converted: see :func:`maskattn.explain.packed_model.packed_model`.

    Attributes:
        model: the explained model.
        multiplies_by_inputs: for captum: whether maps are products of the tokens, or pixels, and their gradients.

    Raises:
        TypeError, ValueError: the model is of an unsupported kind, or cannot be converted.
    """

    multiplies_by_inputs = True

    def __init__(self, model: nn.Module) -> None:
        self.model = packed_model(model)

    @as_captum_calls
    def attribute(
        self,
        inputs: Float[Tensor, "B I X Y"],
        target: Target,
        keep: Bool[Tensor, "..."] | None = None,
        *,
        generator: torch.Generator | None = None,
        return_convergence_gap: bool = False,
    ) -> Float[Tensor, "..."] | tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Explain a prediction.

        Args:
            inputs: (B, in_chans, H·p, W·p) images, or a tuple of one such tensor, as captum passes them.
            target: a class index; a (B,) tensor with one for each image; a list of indices; "all"; a function of
                the model's output that returns (B,) or (B, M) scores, each row of it from the same row of the output;
                or a :class:`maskattn.explain.Concept`.
            keep: (B, H·W) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.
                captum may pass it as ``additional_forward_args``.
            generator: source of random numbers, on any device, for methods that draw them; None takes torch's default
                generator.
            return_convergence_gap: also return the gap that the map leaves unexplained, for methods that are complete
                in the limit: (B,), or (B, M) for several maps.

        Returns:
            Signed relevance, not normalised, 0 at background: (B, H, W), or (B, M, H, W) for a list, "all" and
            functions with several scores.

        Raises:
            TypeError, ValueError: inputs, target or keep do not fit the model, dropout is active (train mode), or the
                method has no convergence gap.
        """
        model = without_head(self.model) if isinstance(target, Concept) else self.model
        request = Request(model, inputs.detach(), target, keep, generator)
        if return_convergence_gap:
            check_explainable(self.model)
            maps_BMHW, gap_BM = self.maps_and_gap(request)
            return _squeezed(self._on_tissue(maps_BMHW, request), target), _squeezed(gap_BM, target)
        return _squeezed(self.answer(request), target)

    def answer(self, request: Request) -> Float[Tensor, "B M H W"]:
        """Return the (B, M, H, W) maps of a request, 0 at background.

        Unlike ``attribute``, this leaves the request's tokens and scores to the caller for further use.

        Raises:
            ValueError: dropout is active (train mode), or the target does not fit the model.
        """
        check_explainable(self.model)
        return self._on_tissue(self.maps(request), request)

    @abstractmethod
    def maps(self, request: Request) -> Float[Tensor, "B M H W"]:
        """Compute the maps of all scores; their values at background are ignored."""

    def maps_and_gap(self, request: Request) -> tuple[Float[Tensor, "B M H W"], Float[Tensor, "B M"]]:
        """Compute the maps, and the difference of scores minus what they and the prefix tokens account for.

        Raises:
            ValueError: the method's maps have no such sum.
        """
        raise ValueError(
            f"a convergence gap belongs to methods whose maps sum to a difference of scores, got "
            f"{type(self).__name__}; use IntegratedCDAM(path='norm')"
        )

    def has_convergence_delta(self) -> bool:
        """Tell captum not to ask for a ``convergence_delta``; use ``return_convergence_gap`` instead."""
        return False

    @property
    def forward_func(self) -> nn.Module:
        """The model, under captum's name for it."""
        return self.model

    @staticmethod
    def _on_tissue(maps_BMHW: Tensor, request: Request) -> Tensor:
        if request.keep is None:
            return maps_BMHW
        return maps_BMHW.masked_fill(~request.keep_BN.view(-1, 1, *request.grid_HW), 0)


@dataclass(frozen=True, eq=False)
class Account:
    """The terms of a complete method: f − f(baseline) = sum over grid tokens + share of the prefix tokens + gap.

    Attributes:
        relevance_MT: (M, T), the scores of packed tokens; those of prefix tokens appear in no map.
        prefix_BM: (B, M), the share of class token and registers through their keys, values and queries.
        difference_BM: (B, M), f − f(baseline).
        gap_BM: (B, M), the remainder; 0 in the limit of many steps.
    """

    relevance_MT: Float[Tensor, "M T"]
    prefix_BM: Float[Tensor, "B M"]
    difference_BM: Float[Tensor, "B M"]
    gap_BM: Float[Tensor, "B M"]


class TokenExplainer(Explainer):
    """A method that reads only the last block's input, so that it applies to every level of a slide model."""

    def maps(self, request: Request) -> Tensor:
        """Compute the relevance of the grid tokens, (B, M, H, W)."""
        relevance_MT = self.relevance(request.model, request.tokens, request.target, request.generator)
        return as_maps(relevance_MT, request.tokens)

    def maps_and_gap(self, request: Request) -> tuple[Tensor, Tensor]:  # noqa: D102 (as of Explainer)
        account = self.account(request.model, request.tokens, request.target)
        return as_maps(account.relevance_MT, request.tokens), account.gap_BM

    @abstractmethod
    def relevance(
        self, model: VisionTransformer, tokens: PackedTokens, target: Target, generator: torch.Generator | None = None
    ) -> Float[Tensor, "M T"]:
        """Compute the scores of all packed tokens; those of prefix tokens are ignored.

        Args:
            model: the model that the target is a function of.
            tokens: the output of ``model.before_last_block``.
            target: see :func:`maskattn.explain.targets.select_scores`.
            generator: source of randomness; None is torch's default generator.
        """

    def account(self, model: VisionTransformer, tokens: PackedTokens, target: Target) -> Account:
        """Compute the same scores and the terms of their sum. Arguments as in :meth:`relevance`.

        Raises:
            ValueError: the method's maps have no such sum.
        """
        raise ValueError(
            f"a convergence gap belongs to methods whose maps sum to a difference of scores, got "
            f"{type(self).__name__}; use IntegratedCDAM(path='norm')"
        )


def as_maps(values_MT: Float[Tensor, "M T"], tokens: PackedTokens) -> Float[Tensor, "B M H W"]:
    """Return values of packed tokens as maps over the grid; prefix tokens are dropped, background is 0."""
    dense_BNM = unpack(values_MT.T, tokens.packing)[:, tokens.num_prefix :]
    return dense_BNM.transpose(1, 2).unflatten(2, tokens.grid_HW)


def sum_of_grid(values_MT: Float[Tensor, "M T"], tokens: PackedTokens) -> Float[Tensor, "B M"]:
    """Return the sum over each image's grid tokens."""
    of_grid = values_MT.masked_fill(tokens.packing.indices % tokens.packing.num_tokens < tokens.num_prefix, 0)
    sums = values_MT.new_zeros(tokens.packing.batch_size, len(values_MT))
    return tokens.of_all(sums.index_add_(0, tokens.packing.sequence_of_token, of_grid.T))


def _squeezed(of_maps: Float[Tensor, "B M ..."], target: Target) -> Float[Tensor, "..."]:
    """Remove the axis M if the target is one score of each image."""
    return of_maps[:, 0] if gives_one_map(target, of_maps.shape[1]) else of_maps
