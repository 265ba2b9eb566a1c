"""Hierarchical CDAM against the gradient of the whole graph, on a slide small enough to hold it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from maskattn.explain import METHODS, HierarchicalCDAM
from maskattn.nn import SlideModel, SlideModelConfig
from maskattn.nn.blocks import DropPath


def random_model(**slide_encoder: object) -> SlideModel:
    config = SlideModelConfig(
        name="small",
        classes=("a", "b", "c"),
        tile_px=64,
        spacing_um=1.0,
        tile_encoder={"embed_dim": 24, "depth": 2, "num_heads": 3},
        slide_encoder={"img_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, **slide_encoder},
    )
    model = SlideModel(config).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def small_slide() -> tuple[Tensor, Tensor, Tensor]:
    keep_HW = torch.tensor([[True, False, True], [True, True, False]])
    keep_Thw = torch.rand(4, 4, 4) > 0.4
    keep_Thw[:, 0, 0] = True
    return torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), keep_Thw, keep_HW


def by_whole_graph(
    model: SlideModel, tiles: Tensor, keep_Thw: Tensor, keep_HW: Tensor, target: int
) -> tuple[Tensor, Tensor]:
    """Σ_j T_ij ∂f/∂T_ij at the tile encoder's last attention input, and the same at the slide encoder's."""
    tile_encoder, slide_encoder = model.tile_encoder, model.slide_encoder
    tokens = tile_encoder.before_last_block(model.tile_tokens(tiles, keep_Thw))
    normed = tile_encoder.last_block.norm1(tokens.rows_TC).detach().requires_grad_()
    embeddings = tile_encoder.pool(tile_encoder.last_block.mix(tokens, normed))
    slide_tokens = slide_encoder.before_last_block(model.slide_tokens(embeddings, keep_HW))
    slide_normed = slide_encoder.last_block.norm1(slide_tokens.rows_TC)
    logits = slide_encoder.pool(slide_encoder.last_block.mix(slide_tokens, slide_normed))
    of_token, _ = torch.autograd.grad(logits[0, target], [normed, slide_normed], retain_graph=True)
    # The tiles' own relevance holds the last block's residual input fixed, as CDAM does.
    fixed = slide_tokens.with_rows(slide_tokens.rows_TC.detach())
    leaf = slide_normed.detach().requires_grad_()
    logits = slide_encoder.pool(slide_encoder.last_block.mix(fixed, leaf))
    of_tile = torch.autograd.grad(logits[0, target], leaf)[0]
    is_grid = tokens.packing.indices % 17 > 0
    return (normed * of_token).sum(1)[is_grid], (leaf * of_tile).sum(1)[slide_tokens.num_prefix :]


@pytest.mark.parametrize("slide_encoder", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}])
@pytest.mark.parametrize("target", [0, 2])
def test_tiles_and_tokens_agree_with_the_gradient_of_the_whole_graph(slide_encoder, target):
    model, (tiles, keep_Thw, keep_HW) = random_model(**slide_encoder), small_slide()
    cdam = HierarchicalCDAM(model, "cdam")
    relevance = cdam.tiles(model.encode_tiles(tiles, keep_Thw), keep_HW)
    maps = cdam.tokens(tiles, keep_Thw, relevance.gradient_KTC)
    of_tokens, of_tiles = by_whole_graph(model, tiles, keep_Thw, keep_HW, target)
    torch.testing.assert_close(relevance.relevance_KT[target], of_tiles)
    torch.testing.assert_close(maps.relevance_KBHW[target][keep_Thw], of_tokens)


COMPLETE = [name for name, method in METHODS.items() if method.levels and method.complete]


@pytest.mark.parametrize("slide_encoder", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}], ids=str)
@pytest.mark.parametrize("method", COMPLETE)
def test_tokens_of_all_tiles_and_what_is_on_none_sum_to_the_slides_score_less_that_of_no_embeddings(
    method, slide_encoder
):
    model, (tiles, keep_Thw, keep_HW) = random_model(**slide_encoder), small_slide()
    embeddings = model.encode_tiles(tiles, keep_Thw)
    difference = (model(embeddings, keep_HW) - model(torch.zeros_like(embeddings), keep_HW)).detach()
    gaps = []
    for m in (2, 48):
        explain = HierarchicalCDAM(model, method, m=m)
        relevance = explain.tiles(embeddings, keep_HW)
        maps = explain.tokens(tiles, keep_Thw, relevance.gradient_KTC)
        accounted = maps.relevance_KBHW.sum(dim=(1, 2, 3)) + maps.unmapped_KB.sum(dim=1)
        gaps.append((accounted - difference).abs().max())
    assert gaps[1] < 1e-5 * difference.abs().max()
    assert gaps[1] < 0.1 * gaps[0]


@pytest.mark.parametrize("slide_encoder", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}], ids=str)
@pytest.mark.parametrize("method", COMPLETE)
def test_tiles_sum_to_the_difference_less_the_class_tokens_part_and_the_gap(method, slide_encoder):
    model, (tiles, keep_Thw, keep_HW) = random_model(**slide_encoder), small_slide()
    embeddings = model.encode_tiles(tiles, keep_Thw)
    gaps = []
    for m in (2, 48):
        relevance = HierarchicalCDAM(model, method, m=m).tiles(embeddings, keep_HW, gradient=False)
        sums = relevance.sums
        torch.testing.assert_close(relevance.relevance_KT.sum(dim=1), sums.difference_K - sums.prefix_K - sums.gap_K)
        gaps.append(sums.gap_K.abs().max())
    assert gaps[1] < 1e-5
    assert gaps[1] < 0.1 * gaps[0]


def test_cdam_promises_no_sum_and_methods_without_levels_are_refused():
    model, (tiles, keep_Thw, keep_HW) = random_model(), small_slide()
    relevance = HierarchicalCDAM(model, "cdam").tiles(model.encode_tiles(tiles, keep_Thw), keep_HW)
    assert relevance.sums is None
    assert HierarchicalCDAM(model, "cdam").tokens(tiles, keep_Thw, relevance.gradient_KTC).unmapped_KB is None
    with pytest.raises(ValueError, match=r"slide model must be one of cdam, .*, got method='rise'"):
        HierarchicalCDAM(model, "rise")


def test_logits_are_the_models_and_maps_are_zero_on_glass():
    model, (tiles, keep_Thw, keep_HW) = random_model(), small_slide()
    embeddings = model.encode_tiles(tiles, keep_Thw)
    relevance = HierarchicalCDAM(model).tiles(embeddings, keep_HW)
    torch.testing.assert_close(relevance.logits_K, model(embeddings, keep_HW).detach())
    maps = HierarchicalCDAM(model).tokens(tiles, keep_Thw, relevance.gradient_KTC)
    assert (maps.relevance_KBHW[:, ~keep_Thw] == 0).all()
    assert (maps.attention_BHW[~keep_Thw] == 0).all()
    assert relevance.attention_T.shape == (4,)
    assert 0 < relevance.attention_T.sum() < 1


def test_the_gradient_can_be_left_out_without_changing_anything_else():
    model, (tiles, keep_Thw, keep_HW) = random_model(), small_slide()
    embeddings = model.encode_tiles(tiles, keep_Thw)
    whole = HierarchicalCDAM(model).tiles(embeddings, keep_HW)
    cheap = HierarchicalCDAM(model).tiles(embeddings, keep_HW, gradient=False)
    assert cheap.gradient_KTC is None
    for name in ("logits_K", "relevance_KT", "attention_T"):
        torch.testing.assert_close(getattr(cheap, name), getattr(whole, name))
        assert not getattr(cheap, name).requires_grad


def test_tiles_may_be_explained_in_batches_of_any_size():
    model, (tiles, keep_Thw, keep_HW) = random_model(), small_slide()
    cdam = HierarchicalCDAM(model)
    gradient = cdam.tiles(model.encode_tiles(tiles, keep_Thw), keep_HW).gradient_KTC
    whole = cdam.tokens(tiles, keep_Thw, gradient).relevance_KBHW
    parts = [
        cdam.tokens(tiles[t : t + 1], keep_Thw[t : t + 1], gradient[:, t : t + 1]).relevance_KBHW for t in range(4)
    ]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1))


def bytes_saved_for_backward(model: SlideModel, call) -> int:
    """The most memory that is saved for backward at a time while ``call`` runs, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: dict[int, int] = {}
    most = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal most
        if x.untyped_storage().data_ptr() not in weights:
            kept = x.detach().clone()
            weakref.finalize(kept, alive.pop, id(kept), None)
            alive[id(kept)] = x.untyped_storage().nbytes()
            most = max(most, sum(alive.values()))
            return kept
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return most


@pytest.mark.parametrize("method", ["cdam", "integrated-weights", "integrated-value"])
def test_memory_of_a_batch_of_tiles_grows_neither_with_their_tokens_nor_with_the_slide(method):
    model, (tiles, _, keep_HW) = random_model(), small_slide()
    every = torch.ones(4, 4, 4, dtype=torch.bool)
    few = every & (torch.arange(16).view(4, 4) < 2)
    cdam = HierarchicalCDAM(model, method)
    gradient = cdam.tiles(model.encode_tiles(tiles, every), keep_HW).gradient_KTC
    of_batch = [
        bytes_saved_for_backward(model, lambda k=keep: cdam.tokens(tiles[:2], k[:2], gradient[:, :2]))
        for keep in (few, every)
    ]
    assert 0 < of_batch[0] == of_batch[1]

    def whole_slide() -> None:
        for t in (0, 2):
            cdam.tokens(tiles[t : t + 2], every[t : t + 2], gradient[:, t : t + 2])

    assert bytes_saved_for_backward(model, whole_slide) == of_batch[0]


def test_embeddings_made_in_inference_mode_can_be_explained():
    model, (tiles, keep_Thw, keep_HW) = random_model(), small_slide()
    with torch.inference_mode():
        relevance = HierarchicalCDAM(model).tiles(model.encode_tiles(tiles, keep_Thw), keep_HW)
        maps = HierarchicalCDAM(model).tokens(tiles, keep_Thw, relevance.gradient_KTC)
    assert maps.relevance_KBHW.isfinite().all()
    assert all(p.grad is None for p in model.parameters())


def test_a_slide_encoder_without_class_token_has_no_attention_row():
    model, (tiles, keep_Thw, keep_HW) = random_model(global_pool="avg", class_token=False), small_slide()
    relevance = HierarchicalCDAM(model).tiles(model.encode_tiles(tiles, keep_Thw), keep_HW)
    assert (relevance.attention_T == 0).all()
    assert relevance.relevance_KT.abs().sum() > 0


def test_a_model_that_drops_at_random_is_refused():
    model, (tiles, keep_Thw, _) = random_model().train(), small_slide()
    model.tile_encoder.blocks[0].drop_path1 = DropPath(0.5)
    with pytest.raises(ValueError, match=r"tile_encoder.* has active dropout"):
        HierarchicalCDAM(model).tokens(tiles, keep_Thw, torch.ones(3, 4, 24, dtype=torch.float64))
