"""Baselines with the interface of CDAM: gradients with respect to the pixels, occlusion and ablation.

captum computes Input×Gradient, Integrated Gradients and SmoothGrad. Its layer-wise relevance propagation has no rule
for attention, so partial LRP is not offered here. The relevance of pixels is summed over each token.
Baselines that read attention matrices are in :mod:`maskattn.explain.attention_baselines`.

Sources: Sundararajan et al., arXiv 1703.01365 (Integrated Gradients); Smilkov et al., arXiv 1706.03825 (SmoothGrad);
Petsiuk et al., arXiv 1806.07421 (RISE).

Dimension key: B images, M maps, S perturbed images, H·W = N grid tokens, p the side of a token in px.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.explain.explainer import Explainer, Request
from maskattn.explain.targets import select_scores
from maskattn.explain.token_subsets import batches, predict_subsets, target_of
from maskattn.shapes import Float

__all__ = ["RISE", "InputXGradient", "IntegratedGradients", "SmoothGrad", "TokenAblation"]


class InputXGradient(Explainer):
    """Input×Gradient: pixels times their gradients, computed by captum."""

    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        from captum.attr import InputXGradient as Captum

        return _by_captum(request, lambda score, x, rows: Captum(score).attribute(x, additional_forward_args=rows))


class IntegratedGradients(Explainer):
    """Integrated Gradients with a baseline of zeros, computed by captum.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        m: number of steps along the path.
        internal_batch_size: images that go through the model at a time, at least the batch.
    """

    def __init__(self, model: nn.Module, m: int = 50, *, internal_batch_size: int = 64) -> None:
        super().__init__(model)
        self.m = m
        self.internal_batch_size = internal_batch_size

    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        from captum.attr import IntegratedGradients as Captum

        size = max(self.internal_batch_size, len(request.inputs))
        return _by_captum(
            request,
            lambda score, x, rows: Captum(score).attribute(
                x, additional_forward_args=rows, n_steps=self.m, internal_batch_size=size
            ),
        )


class SmoothGrad(Explainer):
    """SmoothGrad: the mean gradient over noisy copies of an image, computed by captum, times the image.

    The product with the image makes the map signed. captum draws from torch's default generator, which is seeded from
    the caller's generator for the call and restored afterwards.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        m: number of noisy copies.
        noise: standard deviation, as a fraction of an image's range.
        internal_batch_size: copies that go through the model at a time.
    """

    def __init__(self, model: nn.Module, m: int = 50, noise: float = 0.15, *, internal_batch_size: int = 64) -> None:
        super().__init__(model)
        self.m = m
        self.noise = noise
        self.internal_batch_size = internal_batch_size

    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        from captum.attr import NoiseTunnel, Saliency

        generator = request.generator
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))

        def explain(score: Callable[..., Tensor], x: Tensor, rows: Tensor) -> Tensor:
            x, tunnel, gradients = x.detach(), NoiseTunnel(Saliency(score)), []
            # captum takes one standard deviation for a whole batch, so images are explained one by one.
            for b in range(len(x)):
                torch.manual_seed(seed)
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

        with torch.random.fork_rng(devices=[request.inputs.device] if request.inputs.is_cuda else []):
            return _by_captum(request, explain)


class TokenAblation(Explainer):
    """The loss of score when a token is dropped: f(x) − f(x without token i), by N packed predictions.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        internal_batch_size: ablated images that go through the model at a time.
    """

    multiplies_by_inputs = False

    def __init__(self, model: nn.Module, *, internal_batch_size: int = 64) -> None:
        super().__init__(model)
        self.internal_batch_size = internal_batch_size

    @torch.no_grad()
    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        keep_BN, scores_BM = request.keep_BN, request.scores_BM
        image_S, token_S = keep_BN.nonzero(as_tuple=True)
        keep_SN = keep_BN[image_S]
        keep_SN[torch.arange(len(image_S), device=keep_BN.device), token_S] = False
        maps = scores_BM.new_zeros(*keep_BN.shape, scores_BM.shape[1])
        if len(image_S):
            without_SM = predict_subsets(
                request.model, request.embedded, request.target, image_S, keep_SN, self.internal_batch_size
            )
            maps[image_S, token_S] = scores_BM[image_S] - without_SM
        return maps.transpose(1, 2).unflatten(2, request.grid_HW)


class RISE(Explainer):
    """RISE: the mean of random occlusion masks, weighted by the score of the occluded image.

    The mean score is subtracted first. Raw scores, unlike the probabilities of the paper, have no natural zero, and a
    constant offset would only add the noise of the masks.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        m: number of masks, the same for all images.
        cells: cells of the coarse grid along the longer side.
        visible: share of visible cells.
        internal_batch_size: occluded images that go through the model at a time.
    """

    multiplies_by_inputs = False

    def __init__(
        self, model: nn.Module, m: int = 2000, cells: int = 7, visible: float = 0.5, *, internal_batch_size: int = 64
    ) -> None:
        super().__init__(model)
        self.m = m
        self.cells = cells
        self.visible = visible
        self.internal_batch_size = internal_batch_size

    @torch.no_grad()
    def maps(self, request: Request) -> Tensor:  # noqa: D102 (as of Explainer)
        model, inputs, keep_BN = request.model, request.inputs, request.keep_BN
        masks_S1XY = self._masks((inputs.shape[2], inputs.shape[3]), request.generator).to(inputs)
        scores = []
        for b in range(len(inputs)):
            of_image = target_of(request.target, torch.tensor([b], device=inputs.device))
            for chunk in batches(self.m, self.internal_batch_size):
                occluded = inputs[b] * masks_S1XY[chunk]
                one = of_image.expand(len(occluded)) if isinstance(of_image, Tensor) else of_image
                output = model(occluded, keep_BN[b].expand(len(occluded), -1))
                scores.append(select_scores(output, one))
        scores_BSM = torch.cat(scores).unflatten(0, (len(inputs), self.m))
        visible_SHW = F.avg_pool2d(masks_S1XY, model.patch_embed.patch_size)[:, 0]
        centred = scores_BSM - scores_BSM.mean(dim=1, keepdim=True)
        return torch.einsum("bsm,shw->bmhw", centred, visible_SHW) / (self.m * self.visible)

    def _masks(self, size: tuple[int, int], generator: torch.Generator | None) -> Float[Tensor, "S 1 X Y"]:
        """Draw coarse random grids, upsample them bilinearly and crop at random offsets."""
        device = "cpu" if generator is None else generator.device
        cell = -(-max(size) // self.cells)
        coarse = [-(-side // cell) + 1 for side in size]
        grids = (torch.rand(self.m, 1, *coarse, generator=generator, device=device).cpu() < self.visible).float()
        offsets = torch.randint(cell, (self.m, 2), generator=generator, device=device).tolist()
        masks = torch.empty(self.m, 1, *size)
        for chunk in batches(self.m, 256):
            large = F.interpolate(grids[chunk], scale_factor=cell, mode="bilinear", align_corners=False)
            for mask, enlarged, (top, left) in zip(masks[chunk], large, offsets[chunk], strict=True):
                mask.copy_(enlarged[:, top : top + size[0], left : left + size[1]])
        return masks


def _by_captum(
    request: Request, explain: Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]
) -> Float[Tensor, "B M H W"]:
    """Call captum once for each map; ``explain(score, x, rows)`` returns the relevance of pixels.

    captum repeats ``rows``, the indices of the images, together with the images, so keep and target follow them.
    """
    model, inputs, maps = request.model, request.inputs, []
    for m in range(request.scores_BM.shape[1]):

        def score(x: Tensor, rows: Tensor, m: int = m) -> Tensor:
            return select_scores(model(x, request.keep_BN[rows]), target_of(request.target, rows))[:, m]

        x = inputs.clone().requires_grad_()
        rows = torch.arange(len(inputs), device=inputs.device)
        maps.append(_sum_over_tokens(explain(score, x, rows).detach(), model.patch_embed.patch_size))
    return torch.stack(maps, dim=1)


def _sum_over_tokens(pixels_BIXY: Tensor, p: int) -> Float[Tensor, "B H W"]:
    return F.avg_pool2d(pixels_BIXY.sum(dim=1), p) * p**2
