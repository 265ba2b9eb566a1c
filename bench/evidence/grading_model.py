"""Toy HIPT models for the grading experiment, trained with glass, without it, or with some of it left out.

Stage 1 trains a patch encoder to predict the composition of patches, marks included, as general encoders can; it is
then frozen. Stage 2 trains the region and the slide level on the patients' grades only. The grade is ordinal: output k
is the logit of a grade above k.

Dimension key: S slides, R = 2·3 regions, N = 4·4 patches of a region, M patches, h·w tokens of a patch, C channels,
K = 5 outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.evidence.cohort import GRADES, KINDS, SIZE_PX, TOKEN_PX, Cohort
from maskattn.nn import HIPT, VisionTransformer
from maskattn.nn.encoders.pixels import tokens_of_tiles
from maskattn.nn.region_model import pooled_regions
from maskattn.packing import Packing, pack

__all__ = [
    "GRID_OF_REGIONS",
    "MASKED",
    "PLAIN",
    "Levels",
    "Plan",
    "Tensors",
    "as_tensors",
    "encode",
    "grades_of",
    "hipt_of",
    "new_patch_encoder",
    "new_upper_levels",
    "probabilities",
    "regions_of",
    "train_patch_encoder",
    "train_upper_levels",
    "whitened",
]

PATCH_PX, PATCHES = 32, 4  # patches along a region
REGION_PX = PATCH_PX * PATCHES
GRID_OF_REGIONS = (SIZE_PX[0] // REGION_PX, SIZE_PX[1] // REGION_PX)
SIDE = PATCH_PX // TOKEN_PX  # tokens along a patch
WIDTH = 32
PIXEL_MEAN, PIXEL_STD = (0.85, 0.78, 0.86), (0.20, 0.27, 0.16)
_WHITE = 246  # about the brightness of glass under the inside scanner


@dataclass(frozen=True)
class Levels:
    """The levels at which background is masked."""

    tokens: bool
    patches: bool
    regions: bool


MASKED, PLAIN = Levels(True, True, True), Levels(False, False, False)


@dataclass(frozen=True)
class Plan:
    """The sizes of the cohorts and the lengths of the stages.

    Attributes:
        patients: number in the training cohort.
        test_patients: number in each test cohort.
        patch_steps, patch_batch: steps and batch size of stage 1.
        slide_steps, slide_batch: steps and batch size of stage 2.
        explained: number of slides of each test cohort whose maps are judged.
    """

    patients: int = 60
    test_patients: int = 60
    patch_steps: int = 350
    patch_batch: int = 64
    slide_steps: int = 350
    slide_batch: int = 16
    explained: int = 12


@dataclass(frozen=True)
class Tensors:
    """A cohort in the model's input format.

    Attributes:
        pixels_SRN3pp: (S, R, N, 3, 32, 32) uint8.
        keep_SRNhw: (S, R, N, 4, 4) bool, tokens with tissue.
        shares_SRNMhw: (S, R, N, M, 4, 4), the share of each of M kinds.
        grades_S, patients_S: (S,), grades and numbers of the patients.
    """

    pixels_SRN3pp: Tensor
    keep_SRNhw: Tensor
    shares_SRNMhw: Tensor
    grades_S: Tensor
    patients_S: Tensor

    def keep_patches(self, levels: Levels) -> Tensor:
        """Return (S, R, N) bool, the patches that take part; a region without any is left out."""
        tissue = self.keep_SRNhw.flatten(3).any(dim=3)
        if levels.patches:
            return tissue
        if levels.regions:
            return tissue.any(dim=2, keepdim=True).expand_as(tissue).contiguous()
        return torch.ones_like(tissue)


def regions_of(images_S3XY: Tensor, side: int) -> Tensor:
    """Cut (S, 3, X, Y) images, masks or maps into regions (S, R, 3, side, side), in row-major order."""
    cut = images_S3XY.unflatten(2, (-1, side)).unflatten(4, (-1, side))  # [S, 3, n, side, m, side]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _patches_of(images: Tensor, patch: int) -> Tensor:
    regions = regions_of(images, patch * PATCHES)
    return regions_of(regions.flatten(0, 1), patch).unflatten(0, regions.shape[:2])


def as_tensors(cohort: Cohort) -> Tensors:
    """Cut a cohort into regions and patches."""
    keep = _patches_of(torch.from_numpy(cohort.tissue)[:, None], SIDE)[:, :, :, 0]
    return Tensors(
        _patches_of(torch.from_numpy(cohort.images_S3XY), PATCH_PX),
        keep,
        _patches_of(torch.from_numpy(cohort.shares_SMHW), SIDE),
        torch.from_numpy(cohort.grades_S),
        torch.from_numpy(cohort.patients_S),
    )


def whitened(data: Tensors) -> Tensors:
    """Return the same slides with every token without tissue set to white."""
    large = data.keep_SRNhw.repeat_interleave(TOKEN_PX, 3).repeat_interleave(TOKEN_PX, 4)
    pixels = data.pixels_SRN3pp.masked_fill(~large[:, :, :, None], _WHITE)
    return Tensors(pixels, data.keep_SRNhw, data.shares_SRNMhw, data.grades_S, data.patients_S)


def hipt_of(patch_encoder: VisionTransformer, upper: nn.ModuleDict) -> HIPT:
    """Return the three levels as the package's model, in eval mode."""
    model = HIPT(patch_encoder, upper["region"], upper["slide"], PATCH_PX, PIXEL_MEAN, PIXEL_STD)
    return model.eval()


def new_patch_encoder() -> VisionTransformer:
    """Return an untrained patch level."""
    return VisionTransformer(img_size=PATCH_PX, patch_size=TOKEN_PX, embed_dim=WIDTH, depth=2, num_heads=2)


def new_upper_levels() -> nn.ModuleDict:
    """Return untrained region and slide levels."""
    region = VisionTransformer(
        img_size=PATCHES, patch_size=1, in_chans=WIDTH, embed_dim=WIDTH, depth=2, num_heads=2, embed_act="gelu"
    )
    slide = VisionTransformer(
        img_size=1,
        patch_size=1,
        in_chans=WIDTH,
        num_classes=GRADES - 1,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        pos_embed="none",
        embed_act="gelu",
    )
    return nn.ModuleDict({"region": region, "slide": slide})


def _optimise(module: nn.Module, steps: int, rate: float) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function for each step that takes the loss: AdamW, one cycle, clipped gradients."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)

    def take(loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()

    for _ in range(steps):
        yield take


def _tokens(encoder: VisionTransformer, pixels_M3pp: Tensor, keep_Mhw: Tensor | None) -> Tensor:
    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    return encoder(tokens_of_tiles(encoder, pixels_M3pp, keep_Mhw, mean, std))


def train_patch_encoder(data: Tensors, masked: bool, plan: Plan, seed: int) -> VisionTransformer:
    """Stage 1: train to predict the share of each kind in the tokens that take part, with colour augmentation.

    Half of the patches contain tissue; if masked, all do.
    """
    torch.manual_seed(seed)
    encoder, head = new_patch_encoder(), nn.Linear(WIDTH, len(KINDS))
    pixels, keep = data.pixels_SRN3pp.flatten(0, 2), data.keep_SRNhw.flatten(0, 2)
    shares = data.shares_SRNMhw.flatten(0, 2)
    tissue = keep.flatten(1).any(dim=1)
    marked = (shares[:, KINDS.index("mark")].flatten(1) > 0).any(dim=1)
    pools = [tissue.nonzero()[:, 0]]
    if not masked:
        pools += [(~tissue & ~marked).nonzero()[:, 0], *([marked.nonzero()[:, 0]] if marked.any() else [])]
    draws = [plan.patch_batch] if masked else [plan.patch_batch // 2, plan.patch_batch // 4, plan.patch_batch // 4]
    for take in _optimise(nn.ModuleList([encoder, head]), plan.patch_steps, 2e-3):
        picked = torch.cat([p[torch.randint(len(p), (n,))] for p, n in zip(pools, draws, strict=False)])
        images = pixels[picked].float()
        gain = 1 + 0.06 * torch.randn(len(picked), 3, 1, 1)
        images = (images * gain + 6 * torch.randn(len(picked), 3, 1, 1)).clamp(0, 255).round().to(torch.uint8)
        taking_part = keep[picked] if masked else torch.ones_like(keep[picked])
        weight = taking_part[:, None].float()
        truth = (shares[picked].float() * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3))
        take(F.cross_entropy(head(_tokens(encoder, images, taking_part)), truth))
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def encode(encoder: VisionTransformer, data: Tensors, mask_tokens: bool, batch: int = 1024) -> Tensor:
    """Encode every patch, (S, R, N, C); with masked tokens, a patch of glass has only its class token."""
    pixels, keep = data.pixels_SRN3pp.flatten(0, 2), data.keep_SRNhw.flatten(0, 2)
    rows = [
        _tokens(encoder, images, tissue if mask_tokens else None)
        for images, tissue in zip(pixels.split(batch), keep.split(batch), strict=True)
    ]
    return torch.cat(rows).unflatten(0, data.keep_SRNhw.shape[:3])


def _slide_logits(upper: nn.ModuleDict, features_SRNC: Tensor, keep_SRN: Tensor) -> Tensor:
    """Compute the slides' logits (S, K), with all slides packed together."""
    region, slide = upper["region"], upper["slide"]
    assert isinstance(region, VisionTransformer)
    assert isinstance(slide, VisionTransformer)
    packing = Packing.from_keep(keep_SRN.flatten(0, 1))
    embeddings_TC, kept = pooled_regions(
        region, pack(features_SRNC.flatten(0, 1), packing), packing, (PATCHES, PATCHES)
    )
    packing = Packing.from_keep(kept.unflatten(0, keep_SRN.shape[:2]))
    logits: Tensor = slide(slide.embed_patches(embeddings_TC, packing, GRID_OF_REGIONS))
    return logits


def _flipped(grids: Tensor, axis: int) -> Tensor:
    """Mirror slides (S, R, N, ...): their regions and the patches in them."""
    unfolded = grids.unflatten(1, GRID_OF_REGIONS).unflatten(3, (PATCHES, PATCHES))
    return unfolded.flip(1 + axis, 3 + axis).flatten(3, 4).flatten(1, 2)


def train_upper_levels(
    features_SRNC: Tensor, keep_SRN: Tensor, grades_S: Tensor, plan: Plan, seed: int
) -> nn.ModuleDict:
    """Stage 2: train region and slide level on slides' grades, with mirrored slides and random patches left out."""
    torch.manual_seed(1000 + seed)
    upper = new_upper_levels().train()
    above_SK = (grades_S[:, None] > torch.arange(GRADES - 1)).float()
    for take in _optimise(upper, plan.slide_steps, 2e-3):
        picked = torch.randint(len(grades_S), (plan.slide_batch,))
        features, keep = features_SRNC[picked], keep_SRN[picked]
        for axis in (0, 1):
            if torch.rand(()) < 0.5:
                features, keep = _flipped(features, axis), _flipped(keep, axis)
        thinned = keep & (torch.rand(keep.shape) > 0.5 * torch.rand(len(keep), 1, 1))
        keep = torch.where(thinned.flatten(1).any(dim=1)[:, None, None], thinned, keep)
        take(F.binary_cross_entropy_with_logits(_slide_logits(upper, features, keep), above_SK[picked]))
    return upper.eval().requires_grad_(False)


@torch.no_grad()
def probabilities(upper: nn.ModuleDict, features_SRNC: Tensor, keep_SRN: Tensor) -> Tensor:
    """Compute the probabilities (S, K) of a grade above each k."""
    return _slide_logits(upper, features_SRNC, keep_SRN).sigmoid()


def grades_of(probabilities_SK: Tensor, patients_S: Tensor) -> Tensor:
    """Compute the patients' grades (P,), in the order of their numbers, from the means over their slides."""
    count = int(patients_S.max()) + 1
    total = torch.zeros(count, probabilities_SK.shape[1]).index_add_(0, patients_S, probabilities_SK)
    slides = torch.zeros(count).index_add_(0, patients_S, torch.ones(len(patients_S)))
    return (total / slides[:, None] > 0.5).sum(dim=1)
