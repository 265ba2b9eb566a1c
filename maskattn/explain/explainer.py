"""What every explanation shares: ``attribute``, written once, and the request that a method's ``maps`` answer.

A method says what its maps are; how it is called, which model and tokens the target is a function of, captum's ways of
calling, where randomness comes from and what stands on background is said here.

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
    """What is to be explained; tokens and scores are computed when a method first reads them, without a graph.

    Attributes:
        model: the model that the target is a function of: without its head for a concept.
        inputs: (B, in_chans, X, Y) images.
        target: see :func:`maskattn.explain.targets.select_scores`.
        keep: as the caller gave it, or None.
        generator: source of randomness; None is torch's own.
    """

    model: VisionTransformer
    inputs: Float[Tensor, "B I X Y"]
    target: Target
    keep: Bool[Tensor, "..."] | None = None
    generator: torch.Generator | None = None

    @cached_property
    def grid_HW(self) -> tuple[int, int]:  # noqa: N802 (a dimension key)
        """Rows and columns of tokens."""
        return self.model.patch_embed.grid_of(self.inputs)

    @cached_property
    def keep_BN(self) -> Bool[Tensor, "B N"]:  # noqa: N802 (a dimension key)
        """The grid tokens that take part."""
        return keep_per_token(self.keep, len(self.inputs), self.grid_HW, self.inputs.device)

    @cached_property
    @torch.no_grad()
    def embedded(self) -> PackedTokens:
        """The tokens with which the first block starts."""
        return self.model.embed(self.inputs, self.keep)

    @cached_property
    @torch.no_grad()
    def tokens(self) -> PackedTokens:
        """The last block's input."""
        return self.model.before_last_block(self.embedded)

    @cached_property
    @torch.no_grad()
    def scores_BM(self) -> Float[Tensor, "B M"]:  # noqa: N802 (a dimension key)
        """The scores to explain."""
        return select_scores(self.model.predict(self.tokens), self.target)

    def asking(self, target: Target) -> Request:
        """The same images, explained for another target of the same model; what the backbone gave is not made again."""
        other = replace(self, target=target)
        vars(other).update({name: vars(self)[name] for name in ("embedded", "tokens") if name in vars(self)})
        return other


class Explainer(ABC):
    """A method of explanation: a subclass says what its maps are, and ``attribute`` is the same for all.

    Args:
        model: a :class:`maskattn.nn.VisionTransformer` in eval mode, or a vision transformer of timm or transformers,
            which is converted: see :func:`maskattn.explain.packed_model.packed_model`.

    Attributes:
        model: what is explained.
        multiplies_by_inputs: for captum: maps are products of a token, or of pixels, and its gradient.

    Raises:
        TypeError, ValueError: the model is none of these, or cannot be converted.
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
            inputs: (B, in_chans, H·p, W·p) images, or a tuple of one such tensor, for captum.
            target: a class index; a (B,) tensor with one for each image; a list of indices; "all"; a function of
                the model's output that returns (B,) or (B, M) scores, each row of it from the same row of the output;
                or a :class:`maskattn.explain.Concept`.
            keep: (B, H·W) or (B, H, W) bool over grid tokens, True = the token takes part; None keeps all.
                captum's ``additional_forward_args`` is the same.
            generator: where a method draws at random, its source, on any device; None takes torch's own.
            return_convergence_gap: also return what the map leaves over, by methods that are complete in the limit:
                (B,), or (B, M) for several maps.

        Returns:
            Signed relevance, not normalised, 0 on background: (B, H, W), or (B, M, H, W) for a list, "all" and
            functions with several scores.

        Raises:
            TypeError, ValueError: inputs, target or keep do not fit the model, it drops at random (train mode), or the
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
        """The maps that a request asks for, 0 on background: ``attribute``, where the caller goes on with the tokens.

        Raises:
            ValueError: the model drops at random (train mode), or the target does not fit it.
        """
        check_explainable(self.model)
        return self._on_tissue(self.maps(request), request)

    @abstractmethod
    def maps(self, request: Request) -> Float[Tensor, "B M H W"]:
        """The maps of all scores; what they hold on background does not matter."""

    def maps_and_gap(self, request: Request) -> tuple[Float[Tensor, "B M H W"], Float[Tensor, "B M"]]:
        """The maps, and the difference of scores less what they and the prefix tokens account for.

        Raises:
            ValueError: the method promises no such sum.
        """
        raise ValueError(
            f"a convergence gap belongs to methods whose maps sum to a difference of scores, got "
            f"{type(self).__name__}; use IntegratedCDAM(path='norm')"
        )

    def has_convergence_delta(self) -> bool:
        """Whether captum may ask for a ``convergence_delta``: no; ``return_convergence_gap`` is ours."""
        return False

    @property
    def forward_func(self) -> nn.Module:
        """The model, by captum's name."""
        return self.model

    @staticmethod
    def _on_tissue(maps_BMHW: Tensor, request: Request) -> Tensor:
        if request.keep is None:
            return maps_BMHW
        return maps_BMHW.masked_fill(~request.keep_BN.view(-1, 1, *request.grid_HW), 0)


@dataclass(frozen=True, eq=False)
class Account:
    """What a complete method accounts for: f − f(baseline) = Σ of the grid tokens + the prefix tokens' part + gap.

    Attributes:
        relevance_MT: (M, T), the scores of packed tokens; those of prefix tokens are no part of a map.
        prefix_BM: (B, M), what class token and registers account for, by their keys, values and queries.
        difference_BM: (B, M), f − f(baseline).
        gap_BM: (B, M), what is left over; 0 in the limit of many steps.
    """

    relevance_MT: Float[Tensor, "M T"]
    prefix_BM: Float[Tensor, "B M"]
    difference_BM: Float[Tensor, "B M"]
    gap_BM: Float[Tensor, "B M"]


class TokenExplainer(Explainer):
    """A method that reads the last block's input alone, so that it serves at every level of a slide model."""

    def maps(self, request: Request) -> Tensor:
        """The relevance of the grid tokens."""
        relevance_MT = self.relevance(request.model, request.tokens, request.target, request.generator)
        return as_maps(relevance_MT, request.tokens)

    def maps_and_gap(self, request: Request) -> tuple[Tensor, Tensor]:  # noqa: D102 (as of Explainer)
        account = self.account(request.model, request.tokens, request.target)
        return as_maps(account.relevance_MT, request.tokens), account.gap_BM

    @abstractmethod
    def relevance(
        self, model: VisionTransformer, tokens: PackedTokens, target: Target, generator: torch.Generator | None = None
    ) -> Float[Tensor, "M T"]:
        """The scores of all packed tokens; those of prefix tokens are not looked at.

        Args:
            model: that the target is a function of.
            tokens: what ``model.before_last_block`` gave.
            target: see :func:`maskattn.explain.targets.select_scores`.
            generator: source of randomness.
        """

    def account(self, model: VisionTransformer, tokens: PackedTokens, target: Target) -> Account:
        """The same scores, and what they sum to. Arguments as in :meth:`relevance`.

        Raises:
            ValueError: the method promises no such sum.
        """
        raise ValueError(
            f"a convergence gap belongs to methods whose maps sum to a difference of scores, got "
            f"{type(self).__name__}; use IntegratedCDAM(path='norm')"
        )


def as_maps(values_MT: Float[Tensor, "M T"], tokens: PackedTokens) -> Float[Tensor, "B M H W"]:
    """Values of packed tokens as maps over the grid; prefix tokens are dropped, background is 0."""
    dense_BNM = unpack(values_MT.T, tokens.packing)[:, tokens.num_prefix :]
    return dense_BNM.transpose(1, 2).unflatten(2, tokens.grid_HW)


def sum_of_grid(values_MT: Float[Tensor, "M T"], tokens: PackedTokens) -> Float[Tensor, "B M"]:
    """The sum over each image's grid tokens."""
    of_grid = values_MT.masked_fill(tokens.packing.indices % tokens.packing.num_tokens < tokens.num_prefix, 0)
    sums = values_MT.new_zeros(tokens.packing.batch_size, len(values_MT))
    return sums.index_add_(0, tokens.packing.sequence_of_token, of_grid.T)


def _squeezed(of_maps: Float[Tensor, "B M ..."], target: Target) -> Float[Tensor, "..."]:
    """Without the axis M, where the target is one score of each image."""
    return of_maps[:, 0] if gives_one_map(target, of_maps.shape[1]) else of_maps
