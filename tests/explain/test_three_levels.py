"""CDAM on three levels against the gradient of the whole graph, on a slide small enough to hold it."""

from __future__ import annotations

import pytest
import torch
from small_regions import SIDE, some_regions, with_random_weights
from torch import Tensor, nn

from maskattn.explain import CDAM, FactorisedAttention, ThreeLevelCDAM
from maskattn.nn import HIPT, HIPTHead, VisionTransformer

KEEP_HW = torch.tensor([[True, True], [False, True]])


def random_hipt(**options: object) -> HIPT:
    patch = VisionTransformer(img_size=32, embed_dim=24, depth=2, num_heads=3, **options)
    region = VisionTransformer(
        img_size=2, patch_size=1, in_chans=24, embed_dim=16, depth=2, num_heads=2, embed_act="gelu", **options
    )
    slide = VisionTransformer(img_size=1, patch_size=1, in_chans=16, num_classes=3, embed_dim=24, depth=2, num_heads=3)
    return with_random_weights(HIPT(patch, region, slide, patch_px=32).double())


def gradient_of_all_regions(gradient_KTC: Tensor) -> Tensor:
    every = gradient_KTC.new_full((len(gradient_KTC), 4, gradient_KTC.shape[2]), torch.nan)  # glass: never read
    every[:, KEEP_HW.flatten()] = gradient_KTC
    return every.nan_to_num(1e3)


def by_whole_graph(model: HIPT, regions: Tensor, keep: Tensor, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_j T_ij ∂f/∂T_ij at the last attention input of each encoder, patch encoder first, grid tokens alone."""
    patches = model.cut(regions, keep)
    encoders = (model.patch_encoder, model.region_encoder, model.slide_encoder)

    def begin(level: int, embeddings: Tensor | None):
        if level == 0:
            return encoders[0].embed(patches.pixels_TIpp, patches.keep_Thw)
        if level == 1:
            return model.region_tokens(embeddings, patches)
        return model.slide_tokens(embeddings[KEEP_HW.flatten()], KEEP_HW)

    found = []
    for explained in range(3):
        embeddings, leaf = None, None
        for level, encoder in enumerate(encoders):
            tokens = encoder.before_last_block(begin(level, embeddings))
            normed = encoder.last_block.norm1(tokens.rows_TC)
            if level == explained:  # the last block's residual input is held fixed, as CDAM does
                tokens, leaf = tokens.with_rows(tokens.rows_TC.detach()), normed.detach().requires_grad_()
                normed, of_level = leaf, tokens
            embeddings = encoder.pool(encoder.last_block.mix(tokens, normed))
        (gradient,) = torch.autograd.grad(embeddings[0, target], leaf)
        place = of_level.packing.indices % of_level.packing.num_tokens
        found.append((leaf * gradient).sum(dim=1).detach()[place >= of_level.num_prefix])
    return found[0], found[1], found[2]


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 1}, {"global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("target", [0, 2])
def test_regions_patches_and_tokens_agree_with_the_gradient_of_the_whole_graph(options, target):
    model, (regions, keep) = random_hipt(**options), some_regions(2, 0.5)
    embeddings, with_tissue = model.encode_regions(regions, keep)
    assert torch.equal(with_tissue, KEEP_HW.flatten())
    cdam = ThreeLevelCDAM(model, "cdam")
    slide = cdam.slide(embeddings, KEEP_HW)
    maps = cdam.regions(regions, keep, gradient_of_all_regions(slide.gradient_KTC), batch_size=4)
    of_tokens, of_patches, of_regions = by_whole_graph(model, regions, keep, target)
    patches = model.cut(regions, keep)
    torch.testing.assert_close(slide.relevance_KT[target], of_regions)
    torch.testing.assert_close(maps.patches_KBnm[target].flatten()[patches.packing.indices], of_patches)
    in_regions = maps.tokens_KBhw[target].unflatten(1, (3, SIDE)).unflatten(3, (2, SIDE)).transpose(2, 3)
    in_patches = in_regions.flatten(0, 2)[patches.packing.indices]  # [T, s, s]
    torch.testing.assert_close(in_patches[patches.keep_Thw], of_tokens)
    assert (maps.tokens_KBhw[:, ~keep] == 0).all()
    assert (maps.patches_KBnm[:, 2] == 0).all()


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 1}, {"global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("method", ["integrated-norm", "integrated-weights", "integrated-value"])
def test_tokens_of_all_regions_and_what_is_on_none_sum_to_the_slides_score_less_that_of_no_embeddings(method, options):
    model, (regions, keep) = random_hipt(**options), some_regions(2, 0.5)
    embeddings, _ = model.encode_regions(regions, keep)
    difference = (model(embeddings, KEEP_HW) - model(torch.zeros_like(embeddings), KEEP_HW)).detach()
    gaps = []
    for m in (2, 48):
        explain = ThreeLevelCDAM(model, method, m=m)
        slide = explain.slide(embeddings, KEEP_HW)
        maps = explain.regions(regions, keep, gradient_of_all_regions(slide.gradient_KTC), batch_size=4)
        tissue = KEEP_HW.flatten()
        accounted = maps.tokens_KBhw.sum(dim=(1, 2, 3)) + maps.unmapped_KB[:, tissue].sum(dim=1)
        gaps.append((accounted - difference).abs().max())
    assert gaps[1] < 1e-5 * difference.abs().max()
    assert gaps[1] < 0.1 * gaps[0]


def test_logits_are_the_models_and_the_model_is_left_unchanged():
    model, (regions, keep) = random_hipt(), some_regions(2, 0.5)
    with torch.inference_mode():
        embeddings, _ = model.encode_regions(regions, keep)
        slide = ThreeLevelCDAM(model).slide(embeddings, KEEP_HW)
        maps = ThreeLevelCDAM(model).regions(regions, keep, gradient_of_all_regions(slide.gradient_KTC))
        torch.testing.assert_close(slide.logits_K, model(embeddings, KEEP_HW))
    assert not maps.tokens_KBhw.requires_grad
    assert not maps.patches_KBnm.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())


def test_regions_and_patches_may_be_explained_in_batches_of_any_size():
    model, (regions, keep) = random_hipt(), some_regions(2, 0.5)
    gradient = torch.randn(3, 4, 16, dtype=torch.float64)
    cdam = ThreeLevelCDAM(model)
    whole = cdam.regions(regions, keep, gradient)
    for b in range(4):
        one = cdam.regions(regions[b : b + 1], keep[b : b + 1], gradient[:, b : b + 1], batch_size=1)
        torch.testing.assert_close(one.tokens_KBhw[:, 0], whole.tokens_KBhw[:, b])
        torch.testing.assert_close(one.patches_KBnm[:, 0], whole.patches_KBnm[:, b])


def test_a_hipt_given_to_cdam_is_sent_here():
    with pytest.raises(TypeError, match="ThreeLevelCDAM for a HIPT"):
        CDAM(random_hipt())


def test_regions_of_glass_alone_have_maps_of_zeros():
    model, (regions, keep) = random_hipt(), some_regions(2, 0.5)
    maps = ThreeLevelCDAM(model).regions(regions[:2], torch.zeros_like(keep[:2]), torch.ones(3, 2, 16).double())
    assert maps.tokens_KBhw.shape == (3, 2, 6, 4)
    assert (maps.tokens_KBhw == 0).all()
    assert (maps.patches_KBnm == 0).all()


def test_a_model_that_drops_at_random_is_refused():
    model, (regions, keep) = random_hipt(drop_path_rate=0.5).train(), some_regions(2, 0.5)
    with pytest.raises(ValueError, match=r"patch_encoder.* has active dropout"):
        ThreeLevelCDAM(model).regions(regions, keep, torch.ones(3, 4, 16, dtype=torch.float64))


def gated_hipt() -> HIPT:
    """A model with HIPT's own slide level, which pools."""
    model = random_hipt()
    model = HIPT(model.patch_encoder, model.region_encoder, HIPTHead(16, 3, embed_dim=12), patch_px=32).double()
    for p in model.slide_encoder.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def test_regions_that_are_pooled_have_the_gradient_of_the_whole_slide_level():
    model, (regions, keep) = gated_hipt(), some_regions(2, 0.5)
    embeddings, _ = model.encode_regions(regions, keep)
    leaf = embeddings.detach().requires_grad_()
    logits = model(leaf, KEEP_HW)
    slide = ThreeLevelCDAM(model, "cdam").slide(embeddings, KEEP_HW)
    torch.testing.assert_close(slide.logits_K, logits.detach())
    for c in range(3):
        (gradient,) = torch.autograd.grad(logits[c], leaf, retain_graph=True)
        torch.testing.assert_close(slide.gradient_KTC[c], gradient)
        torch.testing.assert_close(slide.relevance_KT[c], (leaf * gradient).sum(dim=1).detach())
    torch.testing.assert_close(slide.attention_T.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert slide.sums is None


@pytest.mark.parametrize("target", [0, 2])
def test_tokens_under_a_pooled_slide_agree_with_the_gradient_of_the_whole_graph(target):
    model, (regions, keep) = gated_hipt(), some_regions(2, 0.5)
    patches, encoder = model.cut(regions, keep), model.patch_encoder
    tokens = encoder.before_last_block(encoder.embed(patches.pixels_TIpp, patches.keep_Thw))
    leaf = encoder.last_block.norm1(tokens.rows_TC).detach().requires_grad_()
    of_patches = encoder.pool(encoder.last_block.mix(tokens.with_rows(tokens.rows_TC.detach()), leaf))
    embeddings = model.region_encoder(model.region_tokens(of_patches, patches))[KEEP_HW.flatten()]
    (gradient,) = torch.autograd.grad(model(embeddings, KEEP_HW)[target], leaf)
    place = tokens.packing.indices % tokens.packing.num_tokens
    expected = (leaf * gradient).sum(dim=1).detach()[place >= tokens.num_prefix]
    cdam = ThreeLevelCDAM(model, "cdam")
    slide = cdam.slide(embeddings.detach(), KEEP_HW)
    maps = cdam.regions(regions, keep, gradient_of_all_regions(slide.gradient_KTC), batch_size=4)
    in_regions = maps.tokens_KBhw[target].unflatten(1, (3, SIDE)).unflatten(3, (2, SIDE)).transpose(2, 3)
    found = in_regions.flatten(0, 2)[patches.packing.indices]
    torch.testing.assert_close(found[patches.keep_Thw], expected)


def test_under_a_pooled_slide_tokens_and_what_is_on_none_sum_to_the_score_less_that_of_no_embeddings():
    model, (regions, keep) = gated_hipt(), some_regions(2, 0.5)
    embeddings, _ = model.encode_regions(regions, keep)
    difference = (model(embeddings, KEEP_HW) - model(torch.zeros_like(embeddings), KEEP_HW)).detach()
    gaps = []
    for m in (2, 64):
        explain = ThreeLevelCDAM(model, m=m)
        slide = explain.slide(embeddings, KEEP_HW)
        torch.testing.assert_close(slide.sums.difference_K, difference)
        torch.testing.assert_close(slide.relevance_KT.sum(dim=1) + slide.sums.gap_K, difference)
        maps = explain.regions(regions, keep, gradient_of_all_regions(slide.gradient_KTC), batch_size=4)
        accounted = maps.tokens_KBhw.sum(dim=(1, 2, 3)) + maps.unmapped_KB[:, KEEP_HW.flatten()].sum(dim=1)
        gaps.append((accounted - difference).abs().max())
    assert gaps[1] < 0.1 * gaps[0]


def test_maps_of_pixels_are_those_of_the_same_pixels_normalised():
    model, (_, keep) = gated_hipt(), some_regions(2, 0.5)
    pixels = torch.randint(0, 256, (4, 3, 96, 64), dtype=torch.uint8)
    gradient = torch.randn(3, 4, 16, dtype=torch.float64)
    of_pixels = ThreeLevelCDAM(model).regions(pixels, keep, gradient)
    normalised = ThreeLevelCDAM(model).regions((pixels.double() / 255 - 0.5) / 0.5, keep, gradient)
    torch.testing.assert_close(of_pixels.tokens_KBhw, normalised.tokens_KBhw)
    attention = FactorisedAttention(model)
    weights = torch.rand(4, dtype=torch.float64)
    torch.testing.assert_close(
        attention.regions(pixels, keep, weights).combined_Bhw,
        attention.regions((pixels.double() / 255 - 0.5) / 0.5, keep, weights).combined_Bhw,
    )


def test_the_factorised_map_of_a_pooled_slide_counts_its_pooling_weights():
    model, (regions, keep) = gated_hipt(), some_regions(2, 0.5)
    embeddings, _ = model.encode_regions(regions, keep)
    found = FactorisedAttention(model, scale="minmax").slide(embeddings, KEEP_HW)
    weights = model.slide_encoder.attention(embeddings)[0].detach()
    torch.testing.assert_close(found, (weights - weights.min()) / (weights.max() - weights.min()))
