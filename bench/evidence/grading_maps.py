"""Evaluation of the graders' maps: how well they find the planted patterns, and the share of attention on glass.

Dimension key: S slides, R regions, N patches of a region, h·w tokens of a region, H·W tokens of a slide, K outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from bench.evidence.cohort import GRADES, Cohort
from bench.evidence.grading_model import GRID_OF_REGIONS, REGION_PX, TOKEN_PX, Levels, regions_of
from maskattn.explain import METHODS, FactorisedAttention, ThreeLevelCDAM
from maskattn.explain.attention_maps import attend_from_class_token
from maskattn.explain.methods import DEFAULT_METHOD
from maskattn.nn import HIPT, VisionTransformer
from maskattn.nn.packed_tokens import PackedTokens
from maskattn.packing import unpack

__all__ = ["MAPS", "attention_of", "judge_maps", "maps_of_slide"]

_TITLE = METHODS[DEFAULT_METHOD].title
MAPS = (
    "attention",
    "factorised attention",
    "CDAM, regions alone",
    "CDAM, patches",
    "CDAM, three levels",
    f"{_TITLE}, three levels",
)
TUMOUR, MOSTLY_B = 0, 2  # outputs: a grade above 0, and above 2
_SIDE = REGION_PX // TOKEN_PX


def _slide_of(regions_Rhw: Tensor) -> Tensor:
    """Assemble (R, h, w) maps of regions into one of the slide (H, W)."""
    rows, columns = GRID_OF_REGIONS
    return regions_Rhw.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _even(values: Tensor, side: int) -> Tensor:
    """Spread each value evenly over a square of tokens."""
    return values.repeat_interleave(side, -2).repeat_interleave(side, -1) / side**2


def _row(encoder: VisionTransformer, tokens: PackedTokens) -> Tensor:
    """Compute (B, N), the class token's attention to the grid, mean over heads, normalised to sum to 1."""
    rows_T1 = attend_from_class_token(encoder, tokens).mean(dim=0)[:, None]
    dense = unpack(*tokens.with_rows(rows_T1).grid_rows())[..., 0]
    return dense / dense.sum(dim=1, keepdim=True)


@torch.no_grad()
def attention_of(model: HIPT, regions_R3XY: Tensor, keep_Rhw: Tensor) -> Tensor:
    """Compute (H, W), the product of the three levels' attention, a distribution over the slide's tokens."""
    patches = model.cut(regions_R3XY, keep_Rhw)
    tokens = model.patch_encoder.before_last_block(model.patch_tokens(patches.pixels_TIpp, patches.keep_Thw))
    side = patches.keep_Thw.shape[1]
    patch_RNhw = unpack(_row(model.patch_encoder, tokens).unflatten(1, (side, side)), patches.packing)
    region_tokens = model.region_encoder.before_last_block(
        model.region_tokens(model.patch_encoder.predict(tokens), patches)
    )
    embeddings = model.region_encoder.predict(region_tokens)
    kept = keep_Rhw.flatten(1).any(dim=1)
    region_RN = torch.zeros(patch_RNhw.shape[:2])
    region_RN[kept] = _row(model.region_encoder, region_tokens)[kept]
    slide = model.slide_encoder
    assert isinstance(slide, VisionTransformer)
    slide_tokens = slide.before_last_block(model.slide_tokens(embeddings[kept], kept.view(GRID_OF_REGIONS)))
    slide_R = _row(slide, slide_tokens)[0]
    joint = slide_R[:, None, None, None] * region_RN[:, :, None, None] * patch_RNhw
    n = patches.grid_HW
    return _slide_of(joint.unflatten(1, n).transpose(2, 3).flatten(3, 4).flatten(1, 2))


def maps_of_slide(model: HIPT, image_3XY: Tensor, keep_HW: Tensor) -> dict[str, Tensor]:
    """Compute each of :data:`MAPS` as (K, H, W); attention is the same for every output.

    Args:
        model: a HIPT in eval mode.
        image_3XY: (3, X, Y) uint8.
        keep_HW: (H, W) bool, the tokens of the slide that take part.
    """
    regions = regions_of(image_3XY[None], REGION_PX)[0]
    keep = regions_of(keep_HW[None, None], _SIDE)[0, :, 0].contiguous()
    with torch.no_grad():
        embeddings, kept = model.encode_regions(regions, keep)
    grid = kept.view(GRID_OF_REGIONS)
    maps = {MAPS[0]: attention_of(model, regions, keep).expand(GRADES - 1, -1, -1)}
    factorised = FactorisedAttention(model, trained=("region",))
    slide_R = torch.zeros(len(kept))
    slide_R[kept] = factorised.slide(embeddings, grid)
    combined = factorised.regions(regions, keep, slide_R).combined_Bhw
    maps[MAPS[1]] = _slide_of(combined).expand(GRADES - 1, -1, -1)
    for name in ("cdam", DEFAULT_METHOD):
        explainer = ThreeLevelCDAM(model, name)
        of_slide = explainer.slide(embeddings, grid)
        assert of_slide.gradient_KTC is not None
        gradient = embeddings.new_zeros(GRADES - 1, len(kept), embeddings.shape[1])
        gradient[:, kept] = of_slide.gradient_KTC
        of_regions = explainer.regions(regions, keep, gradient)
        if name == "cdam":
            levels_KR = embeddings.new_zeros(GRADES - 1, len(kept))
            levels_KR[:, kept] = of_slide.relevance_KT
            maps[MAPS[2]] = torch.stack([_slide_of(_even(m[:, None, None], _SIDE)) for m in levels_KR])
            side = _SIDE // of_regions.patches_KBnm.shape[-1]
            maps[MAPS[3]] = torch.stack([_slide_of(_even(m, side)) for m in of_regions.patches_KBnm])
        tokens = torch.stack([_slide_of(m) for m in of_regions.tokens_KBhw])
        maps[MAPS[4] if name == "cdam" else MAPS[5]] = tokens
    return maps


def _questions(cohort: Cohort, slide: int, tumour: np.ndarray, b: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield the questions for a slide's map: name, explained output, and the tokens of the correct answer."""
    if tumour[slide].any():
        yield "tumour", TUMOUR, tumour[slide]
    if 2 <= cohort.grades_S[slide] <= 4 and b[slide].any():
        yield "pattern B", MOSTLY_B, b[slide]


def judge_maps(model: HIPT, cohort: Cohort, levels: Levels, count: int) -> dict[str, list[float]]:
    """Compute metrics of some slides with a lesion, each as a list with one value for each slide.

    These are "attention on glass" and, for each map and question, the average precision over all tokens of the slide
    ("whole slide") and over those with tissue ("tissue"), which a map reaches once glass is blanked out.

    Args:
        model: a HIPT in eval mode.
        cohort: a cohort with grades in turn and two slides for each patient.
        levels: levels at which background is masked: all or none.
        count: number of slides.
    """
    found: dict[str, list[float]] = {}
    tumour, b, tissue = cohort.pattern("pattern A", "pattern B"), cohort.pattern("pattern B"), cohort.tissue
    for slide in np.flatnonzero(cohort.grades_S > 0)[:count].tolist():
        inside = tissue[slide]
        keep = torch.from_numpy(inside if levels.tokens else np.ones_like(inside))
        maps = maps_of_slide(model, torch.from_numpy(cohort.images_S3XY[slide]), keep)
        glass = float(maps[MAPS[0]][0].numpy()[~inside].sum())
        found.setdefault("attention on glass", []).append(glass)
        for question, output, truth in _questions(cohort, slide, tumour, b):
            scored = {name: maps[name][output].numpy().astype(np.float64) for name in MAPS}
            for name, values in scored.items():
                for where, area in (("whole slide", np.ones_like(inside)), ("tissue", inside)):
                    score = average_precision_score(truth[area], values[area])
                    found.setdefault(f"{question}|{where}|{name}", []).append(float(score))
            for where, area in (("whole slide", np.ones_like(inside)), ("tissue", inside)):
                found.setdefault(f"{question}|{where}|random", []).append(float(truth[area].mean()))
    return found
