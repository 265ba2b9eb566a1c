"""Metrics of maps: agreement with the score, compactness and separation of classes.

Perturbed images go through the model in batches. With "drop" they are packed subsets of the tokens, which is exact and
needs no substitute pixels; "blur" and "mean" replace the tokens by a blurred image or by each channel's mean.

Dimension key: B images, S perturbed images, Q shares removed, H·W = N grid tokens, X·Y px.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.explain.concepts import Concept
from maskattn.explain.packed_model import packed_model, without_head
from maskattn.explain.targets import Target, select_scores
from maskattn.explain.token_subsets import batches, predict_subsets, target_of
from maskattn.nn.kept_tokens import keep_per_token
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, Int

__all__ = [
    "Perturbation",
    "RemovalCurves",
    "background_mass",
    "box_changes",
    "box_sensitivity",
    "compactness",
    "correlation_of_maps",
    "object_contrast",
    "random_boxes",
    "removal_curves",
]

Perturbation: TypeAlias = Literal["drop", "blur", "mean"]
_BLUR_RADIUS_PX = 14


@dataclass(frozen=True)
class RemovalCurves:
    """Scores as tokens are removed in the order of their relevance.

    Attributes:
        share_Q: (Q,), share of the kept tokens removed, 0 … 1.
        most_first_BQ: (B, Q), scores with the most relevant tokens removed first (MIF).
        least_first_BQ: (B, Q), scores with the least relevant tokens removed first (LIF).
    """

    share_Q: Float[Tensor, "Q"]
    most_first_BQ: Float[Tensor, "B Q"]
    least_first_BQ: Float[Tensor, "B Q"]

    @property
    def correctness(self) -> Float[Tensor, "B"]:
        """The area between the two curves, (B,), in units of the score; higher is better."""
        return torch.trapezoid(self.least_first_BQ - self.most_first_BQ, self.share_Q.to(self.most_first_BQ), dim=1)


def removal_curves(
    model: nn.Module,
    inputs: Float[Tensor, "B I X Y"],
    maps_BHW: Float[Tensor, "B H W"],
    target: Target,
    keep: Bool[Tensor, "..."] | None = None,
    *,
    perturbation: Perturbation = "drop",
    steps: int = 16,
    internal_batch_size: int = 64,
) -> RemovalCurves:
    """Remove tokens in the order of their relevance and record the score.

    Args:
        model: as for every :class:`maskattn.explain.explainer.Explainer`.
        inputs: (B, in_chans, H·p, W·p) images; or a single image that all maps belong to, whose common subsets are
            predicted once.
        maps_BHW: (B, H, W), the relevance to evaluate.
        target: one score of each image; a function must treat each row of the output independently.
        keep: (B, H·W) or (B, H, W) bool; background is not part of the order.
        perturbation: "drop", "blur" or "mean"; the last two need finite pixels at background, too.
        steps: Q − 1, equal steps of the share removed.
        internal_batch_size: perturbed images that go through the model at a time.

    Raises:
        ValueError: maps do not fit the images, the target has several scores, or there is no such perturbation.
    """
    model, keep_BN = _prepare(model, inputs, maps_BHW, target, keep)
    B = len(maps_BHW)
    source_B = torch.arange(len(inputs), device=inputs.device).expand(B)
    keep_of_image_BN, keep_BN = keep_BN, keep_BN.expand(B, -1)
    share_Q = torch.linspace(0, 1, steps + 1, device=inputs.device)
    kept_B1 = keep_BN.sum(dim=1, keepdim=True)
    removed_BQ = (share_Q * kept_B1).round()
    relevance = maps_BHW.flatten(1).masked_fill(~keep_BN, -torch.inf)  # background comes last, after all kept tokens
    rank_BN = relevance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    gone = rank_BN[:, None] < removed_BQ[..., None], (kept_B1 - 1 - rank_BN)[:, None] < removed_BQ[..., None]
    keep_SN = (keep_BN[:, None] & ~torch.stack(gone)).flatten(0, 2)  # [2 · B · Q, N]
    source_S = source_B.repeat_interleave(steps + 1).repeat(2)
    scores = _perturbed_scores(
        model, inputs, target, keep_of_image_BN, source_S, keep_SN, perturbation, internal_batch_size
    )
    most, least = scores.view(2, B, steps + 1)
    return RemovalCurves(share_Q, most, least)


def random_boxes(grid_HW: tuple[int, int], count: int, generator: torch.Generator) -> Bool[Tensor, "S H W"]:
    """Draw random boxes of tokens, whose sides range from one token to half of the grid's.

    Args:
        grid_HW: rows and columns of tokens.
        count: S, the number of boxes.
        generator: source of randomness, on the CPU.
    """
    extents = []
    for size in grid_HW:
        length = torch.randint(1, max(size // 2, 1) + 1, (count, 1), generator=generator)
        start = (torch.rand(count, 1, generator=generator) * (size - length + 1)).long()
        position = torch.arange(size)
        extents.append((position >= start) & (position < start + length))
    return extents[0][:, :, None] & extents[1][:, None, :]


def box_changes(
    model: nn.Module,
    inputs: Float[Tensor, "B I X Y"],
    boxes_SHW: Bool[Tensor, "S H W"],
    target: Target,
    keep: Bool[Tensor, "..."] | None = None,
    *,
    perturbation: Perturbation = "drop",
    internal_batch_size: int = 64,
) -> Float[Tensor, "B S"]:
    """Compute each image's loss of score when a box is perturbed, (B, S), which all maps of these images can share.

    Arguments and errors as in :func:`removal_curves`; ``boxes_SHW`` comes from :func:`random_boxes`.
    """
    model, keep_BN = _prepare(model, inputs, None, target, keep)
    count = len(boxes_SHW) + 1
    none = boxes_SHW.new_zeros(1, *boxes_SHW.shape[1:])
    boxes_SN = torch.cat([none, boxes_SHW]).flatten(1).to(inputs.device)
    keep_SN = (keep_BN[:, None] & ~boxes_SN).flatten(0, 1)
    source_S = torch.arange(len(inputs), device=inputs.device).repeat_interleave(count)
    scores = _perturbed_scores(model, inputs, target, keep_BN, source_S, keep_SN, perturbation, internal_batch_size)
    scores_BS = scores.view(len(inputs), count)
    return scores_BS[:, :1] - scores_BS[:, 1:]


def box_sensitivity(
    maps_BHW: Float[Tensor, "B H W"], boxes_SHW: Bool[Tensor, "S H W"], changes_BS: Float[Tensor, "B S"]
) -> Float[Tensor, "B"]:
    """Compute the Pearson correlation of the relevance in boxes with :func:`box_changes`, (B,); 0 for flat maps."""
    inside_BS = torch.einsum("bhw,shw->bs", maps_BHW, boxes_SHW.to(maps_BHW))
    return _correlation(inside_BS, changes_BS.to(inside_BS))


def compactness(maps_BHW: Float[Tensor, "B H W"], keep_BHW: Bool[Tensor, "B H W"] | None = None) -> Float[Tensor, "B"]:
    """Compute the share of kept tokens whose |relevance| is at most 5 % of the map's largest, (B,)."""
    size = maps_BHW.flatten(1).abs()
    small = size <= 0.05 * size.amax(dim=1, keepdim=True)
    kept = torch.ones_like(small) if keep_BHW is None else keep_BHW.flatten(1)
    return (small & kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


def correlation_of_maps(one_BHW: Float[Tensor, "B H W"], other_BHW: Float[Tensor, "B H W"]) -> Float[Tensor, "B"]:
    """Compute the Pearson correlation of two classes' maps of each image, (B,): class sensitivity, lower is better."""
    return _correlation(one_BHW.flatten(1), other_BHW.flatten(1))


def object_contrast(
    maps_BHW: Float[Tensor, "B H W"], own_BHW: Bool[Tensor, "B H W"], other_BHW: Bool[Tensor, "B H W"]
) -> Float[Tensor, "B"]:
    """Compute how much more relevance is on a class's own object than on the other one, (B,), in [−1, 1].

    The contrast is (s̄_own − s̄_other) / (mean |s| on own + mean |s| on other). A map that does not depend on the class
    scores 0 on average over the two classes of an image.

    Args:
        maps_BHW: (B, H, W), the class's map.
        own_BHW, other_BHW: (B, H, W) bool, the tokens of the class's object and of the other.
    """

    def mean(x: Tensor, area: Tensor) -> Tensor:
        return (x * area).sum(dim=(1, 2)) / area.sum(dim=(1, 2)).clamp(min=1)

    size = mean(maps_BHW.abs(), own_BHW) + mean(maps_BHW.abs(), other_BHW)
    difference = mean(maps_BHW, own_BHW) - mean(maps_BHW, other_BHW)
    return torch.where(size > 0, difference / size.where(size > 0, 1), 0)


def background_mass(maps_BHW: Float[Tensor, "B H W"], background_BHW: Bool[Tensor, "B H W"]) -> Float[Tensor, "B"]:
    """Compute the share of attention, or of |relevance|, on background tokens, (B,); 0 for a map of zeros."""
    size = maps_BHW.abs().double()
    total = size.sum(dim=(1, 2))
    return torch.where(total > 0, (size * background_BHW).sum(dim=(1, 2)) / total.where(total > 0, 1), 0)


def _prepare(
    model: nn.Module, inputs: Tensor, maps_BHW: Tensor | None, target: Target, keep: Tensor | None
) -> tuple[VisionTransformer, Tensor]:
    vit = packed_model(model)
    vit = without_head(vit) if isinstance(target, Concept) else vit
    grid_HW = vit.patch_embed.grid_of(inputs)
    of_one_image = maps_BHW is not None and len(inputs) == 1 and tuple(maps_BHW.shape[1:]) == grid_HW
    if maps_BHW is not None and not of_one_image and tuple(maps_BHW.shape) != (len(inputs), *grid_HW):
        raise ValueError(
            f"maps must have one value for each token, (B, H, W) = {(len(inputs), *grid_HW)}, got "
            f"{tuple(maps_BHW.shape)}; pass the map of one class"
        )
    return vit, keep_per_token(keep, len(inputs), grid_HW, inputs.device)


@torch.no_grad()
def _perturbed_scores(
    model: VisionTransformer,
    inputs: Tensor,
    target: Target,
    keep_BN: Tensor,
    source_S: Int[Tensor, "S"],
    keep_SN: Bool[Tensor, "S N"],
    perturbation: Perturbation,
    internal_batch_size: int,
) -> Float[Tensor, "S"]:
    """Compute the scores of images in which the kept tokens outside ``keep_SN`` are perturbed."""
    if perturbation not in ("drop", "blur", "mean"):
        raise ValueError(f"perturbation must be 'drop', 'blur' or 'mean', got perturbation={perturbation!r}")
    # All curves of an image share their first and last subsets: equal subsets are predicted once.
    subsets, index_S = torch.unique(torch.cat([source_S[:, None], keep_SN.long()], 1), dim=0, return_inverse=True)
    source_S, keep_SN = subsets[:, 0], subsets[:, 1:].bool()
    if perturbation == "drop":
        tokens = model.embed(inputs, keep_BN)
        scores_SM = predict_subsets(model, tokens, target, source_S, keep_SN, internal_batch_size)
    else:
        inputs = model.patch_embed.whole_patches(inputs)
        substitute = blurred(inputs) if perturbation == "blur" else inputs.mean(dim=(2, 3), keepdim=True)
        substitute = substitute.expand_as(inputs)
        p, grid_HW, scores = model.patch_embed.patch_size, model.patch_embed.grid_of(inputs), []
        for chunk in batches(len(source_S), internal_batch_size):
            seen = keep_SN[chunk].view(-1, 1, *grid_HW).repeat_interleave(p, 2).repeat_interleave(p, 3)
            image = source_S[chunk]
            output = model(torch.where(seen, inputs[image], substitute[image]), keep_BN[image])
            scores.append(select_scores(output, target_of(target, image)))
        scores_SM = torch.cat(scores)
    if scores_SM.shape[1] != 1:
        raise ValueError(f"a metric evaluates one score of each image, got a target with {scores_SM.shape[1]}")
    return scores_SM[index_S, 0]


def blurred(images: Float[Tensor, "B I X Y"], radius_px: int = _BLUR_RADIUS_PX) -> Float[Tensor, "B I X Y"]:
    """Blur images by a Gaussian with a standard deviation of ``radius_px``, replicating the edges."""
    half = 3 * radius_px
    kernel = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=images.device) / radius_px) ** 2).to(images)
    kernel = kernel / kernel.sum()
    rows = F.pad(images.flatten(0, 1)[:, None], (half,) * 4, mode="replicate")
    rows = F.conv2d(F.conv2d(rows, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return rows.view_as(images)


def _correlation(a_BN: Tensor, b_BN: Tensor) -> Float[Tensor, "B"]:
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a_BN.double(), b_BN.double()))
    scale = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(scale > 0, (a * b).sum(dim=1) / scale.where(scale > 0, 1), 0)
