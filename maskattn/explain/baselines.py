"""What users compare CDAM with, behind the same interface: gradients at the pixels, occlusion and ablation.

captum computes what it has (Input×Gradient, Integrated Gradients, SmoothGrad); its layer-wise relevance propagation has
no rule for attention, so that partial LRP is not offered here. Pixels' relevance is summed over each token.
The methods that read attention matrices are in :mod:`maskattn.explain.attention_baselines`.

Sources: Sundararajan et al., arXiv 1703.01365 (Integrated Gradients); Smilkov et al., arXiv 1706.03825 (SmoothGrad);
Petsiuk et al., arXiv 1806.07421 (RISE).

Dimension key: B images, M maps, S perturbed images, H·W = N grid tokens, p the side of a token in px.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.explain.cdam import squeeze_maps
from maskattn.explain.concepts import Concept
from maskattn.explain.packed_model import check_explainable, packed_model, without_head
from maskattn.explain.targets import Target, select_scores
from maskattn.explain.token_subsets import batches, predict_subsets, target_of
from maskattn.nn.kept_tokens import keep_per_token
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float

__all__ = ["RISE", "Baseline", "InputXGradient", "IntegratedGradients", "SmoothGrad", "TokenAblation"]


class Baseline(ABC):
    """A method of comparison: ``attribute`` as of :class:`maskattn.explain.CDAM`.

    Args:
        model: as for :class:`maskattn.explain.CDAM`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = packed_model(model)

    @torch.inference_mode(False)
    def attribute(
        self, inputs: Float[Tensor, "B I X Y"], target: Target, keep: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """Maps at token resolution. Arguments and results as of :meth:`maskattn.explain.CDAM.attribute`.

        Args:
            inputs, keep: see there.
            target: see there; a function must treat each row of the output for itself.
        """
        check_explainable(self.model)
        model = without_head(self.model) if isinstance(target, Concept) else self.model
        grid_HW = model.patch_embed.grid_of(inputs)
        keep_BN = keep_per_token(keep, len(inputs), grid_HW, inputs.device)
        with torch.no_grad():
            scores_BM = select_scores(model(inputs, keep_BN), target)
        maps = self.maps(model, inputs.detach(), target, keep_BN, scores_BM)
        maps = maps.masked_fill(~keep_BN.view(-1, 1, *grid_HW), 0)
        return squeeze_maps(maps, target, scores_BM)

    @abstractmethod
    def maps(
        self, model: VisionTransformer, inputs: Tensor, target: Target, keep_BN: Tensor, scores_BM: Tensor
    ) -> Float[Tensor, "B M H W"]:
        """The maps, whatever they hold at background; ``scores_BM`` are the target's."""


class InputXGradient(Baseline):
    """Pixels times their gradients, by captum."""

    def maps(  # noqa: D102 (as of Baseline)
        self, model: VisionTransformer, inputs: Tensor, target: Target, keep_BN: Tensor, scores_BM: Tensor
    ) -> Tensor:
        from captum.attr import InputXGradient as Captum

        return _by_captum(
            model,
            inputs,
            target,
            keep_BN,
            scores_BM,
            lambda score, x, rows: Captum(score).attribute(x, additional_forward_args=rows),
        )


class IntegratedGradients(Baseline):
    """Integrated Gradients from a zero image, by captum.

    Args:
        model: as for :class:`maskattn.explain.CDAM`.
        m: steps of the path.
        internal_batch_size: images in the model at a time, at least the batch.
    """

    def __init__(self, model: nn.Module, m: int = 50, *, internal_batch_size: int = 64) -> None:
        super().__init__(model)
        self.m = m
        self.internal_batch_size = internal_batch_size

    def maps(  # noqa: D102 (as of Baseline)
        self, model: VisionTransformer, inputs: Tensor, target: Target, keep_BN: Tensor, scores_BM: Tensor
    ) -> Tensor:
        from captum.attr import IntegratedGradients as Captum

        size = max(self.internal_batch_size, len(inputs))
        return _by_captum(
            model,
            inputs,
            target,
            keep_BN,
            scores_BM,
            lambda score, x, rows: Captum(score).attribute(
                x, additional_forward_args=rows, n_steps=self.m, internal_batch_size=size
            ),
        )


class SmoothGrad(Baseline):
    """The mean gradient at noisy copies of an image, by captum, times the image, so that it is signed.

    Args:
        model: as for :class:`maskattn.explain.CDAM`.
        m: noisy copies.
        noise: standard deviation, as a share of an image's range.
        seed: of the noise, which torch's own generator gives; its state is put back.
        internal_batch_size: copies in the model at a time.
    """

    def __init__(
        self, model: nn.Module, m: int = 50, noise: float = 0.15, *, seed: int = 0, internal_batch_size: int = 64
    ) -> None:
        super().__init__(model)
        self.m = m
        self.noise = noise
        self.seed = seed
        self.internal_batch_size = internal_batch_size

    def maps(  # noqa: D102 (as of Baseline)
        self, model: VisionTransformer, inputs: Tensor, target: Target, keep_BN: Tensor, scores_BM: Tensor
    ) -> Tensor:
        from captum.attr import NoiseTunnel, Saliency

        def explain(score: Callable[..., Tensor], x: Tensor, rows: Tensor) -> Tensor:
            x, tunnel, gradients = x.detach(), NoiseTunnel(Saliency(score)), []
            # captum takes one standard deviation for a whole batch, so that images go one by one.
            for b in range(len(x)):
                torch.manual_seed(self.seed)
                gradient = tunnel.attribute(
                    x[b : b + 1].clone().requires_grad_(),
                    nt_type="smoothgrad",
                    nt_samples=self.m,
                    nt_samples_batch_size=min(self.m, self.internal_batch_size),
                    stdevs=self.noise * float(x[b].max() - x[b].min()),
                    additional_forward_args=rows[b : b + 1],
                    abs=False,
                )
                gradients.append(gradient)
            return torch.cat(gradients) * x

        with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            return _by_captum(model, inputs, target, keep_BN, scores_BM, explain)


class TokenAblation(Baseline):
    """What a score loses when a token is dropped: f(x) − f(x without token i), by N packed predictions.

    Args:
        model: as for :class:`maskattn.explain.CDAM`.
        internal_batch_size: ablated images in the model at a time.
    """

    def __init__(self, model: nn.Module, *, internal_batch_size: int = 64) -> None:
        super().__init__(model)
        self.internal_batch_size = internal_batch_size

    @torch.no_grad()
    def maps(  # noqa: D102 (as of Baseline)
        self, model: VisionTransformer, inputs: Tensor, target: Target, keep_BN: Tensor, scores_BM: Tensor
    ) -> Tensor:
        tokens = model.embed(inputs, keep_BN)
        image_S, token_S = keep_BN.nonzero(as_tuple=True)
        keep_SN = keep_BN[image_S]
        keep_SN[torch.arange(len(image_S), device=keep_BN.device), token_S] = False
        without_SM = predict_subsets(model, tokens, target, image_S, keep_SN, self.internal_batch_size)
        maps = scores_BM.new_zeros(*keep_BN.shape, scores_BM.shape[1])
        maps[image_S, token_S] = scores_BM[image_S] - without_SM
        return maps.transpose(1, 2).unflatten(2, tokens.grid_HW)


class RISE(Baseline):
    """Random smooth occlusions: a token's relevance is how its visibility goes along with the score.

    The scores' mean is taken off first: raw scores, unlike the probabilities of the paper, have no zero of their own,
    and a constant would only add the noise of the masks.

    Args:
        model: as for :class:`maskattn.explain.CDAM`.
        m: masks, the same for all images.
        cells: of the coarse grid along the longer side.
        visible: share of visible cells.
        seed: of the masks.
        internal_batch_size: occluded images in the model at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        m: int = 2000,
        cells: int = 7,
        visible: float = 0.5,
        *,
        seed: int = 0,
        internal_batch_size: int = 64,
    ) -> None:
        super().__init__(model)
        self.m = m
        self.cells = cells
        self.visible = visible
        self.seed = seed
        self.internal_batch_size = internal_batch_size

    @torch.no_grad()
    def maps(  # noqa: D102 (as of Baseline)
        self, model: VisionTransformer, inputs: Tensor, target: Target, keep_BN: Tensor, scores_BM: Tensor
    ) -> Tensor:
        masks_S1XY = self._masks((inputs.shape[2], inputs.shape[3])).to(inputs)
        scores = []
        for b in range(len(inputs)):
            of_image = target_of(target, torch.tensor([b], device=inputs.device))
            for part in batches(self.m, self.internal_batch_size):
                occluded = inputs[b] * masks_S1XY[part]
                one = of_image.expand(len(occluded)) if isinstance(of_image, Tensor) else of_image
                output = model(occluded, keep_BN[b].expand(len(occluded), -1))
                scores.append(select_scores(output, one))
        scores_BSM = torch.cat(scores).unflatten(0, (len(inputs), self.m))
        visible_SHW = F.avg_pool2d(masks_S1XY, model.patch_embed.patch_size)[:, 0]
        centred = scores_BSM - scores_BSM.mean(dim=1, keepdim=True)
        return torch.einsum("bsm,shw->bmhw", centred, visible_SHW) / (self.m * self.visible)

    def _masks(self, size: tuple[int, int]) -> Float[Tensor, "S 1 X Y"]:
        """Coarse random grids, enlarged smoothly and cut at random offsets."""
        generator = torch.Generator().manual_seed(self.seed)
        cell = -(-max(size) // self.cells)
        coarse = [-(-side // cell) + 1 for side in size]
        grids = (torch.rand(self.m, 1, *coarse, generator=generator) < self.visible).float()
        offsets = torch.randint(cell, (self.m, 2), generator=generator).tolist()
        masks = torch.empty(self.m, 1, *size)
        for part in batches(self.m, 256):
            large = F.interpolate(grids[part], scale_factor=cell, mode="bilinear", align_corners=False)
            for mask, whole, (top, left) in zip(masks[part], large, offsets[part], strict=True):
                mask.copy_(whole[:, top : top + size[0], left : left + size[1]])
        return masks


def _by_captum(
    model: VisionTransformer,
    inputs: Tensor,
    target: Target,
    keep_BN: Tensor,
    scores_BM: Tensor,
    explain: Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor],
) -> Float[Tensor, "B M H W"]:
    """One call of captum for each map; ``explain(score, x, rows)`` gives relevance of pixels.

    captum repeats ``rows``, the indices of the images, as it repeats the images: keep and target follow them.
    """
    maps = []
    for m in range(scores_BM.shape[1]):

        def score(x: Tensor, rows: Tensor, m: int = m) -> Tensor:
            return select_scores(model(x, keep_BN[rows]), target_of(target, rows))[:, m]

        x = inputs.clone().requires_grad_()
        rows = torch.arange(len(inputs), device=inputs.device)
        maps.append(_sum_over_tokens(explain(score, x, rows).detach(), model.patch_embed.patch_size))
    return torch.stack(maps, dim=1)


def _sum_over_tokens(pixels_BIXY: Tensor, p: int) -> Float[Tensor, "B H W"]:
    return F.avg_pool2d(pixels_BIXY.sum(dim=1), p) * p**2
