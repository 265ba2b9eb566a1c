"""Methods that read the last attention row, against every subset and every token dropped, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from small_vits import random_vit, sample

from maskattn.explain.attention_row import AttentionRowAblation
from maskattn.explain.token_subsets import take_subsets

MODELS = [{}, {"reg_tokens": 2, "init_values": 0.3}, {"pos_embed": "rotary"}, {"qk_norm": True}, {"qkv_bias": False}]
KINDS = [AttentionRowAblation, partial(AttentionRowAblation, first_order=True)]


@torch.no_grad()
def score_without(model, tokens, b: int, keep_N, target: int):
    """The last block and what follows it, run on the tokens of one image that are kept."""
    subset = take_subsets(tokens, torch.tensor([b]), keep_N[None])
    return model.predict(subset)[0, target]


@pytest.mark.parametrize("variant", MODELS, ids=str)
def test_ablation_is_the_loss_of_score_without_a_token_in_the_last_block(variant):
    model, (x, keep) = random_vit(**variant), sample()
    with torch.no_grad():
        tokens = model.before_last_block(model.embed(x, keep))
    for size in (1, 4, 4096):
        maps = AttentionRowAblation(model, internal_batch_size=size).attribute(x, "all", keep)
        for b, row, column in keep.nonzero().tolist():
            left = keep[b].clone()
            left[row, column] = False
            for target in (0, 3):
                whole = score_without(model, tokens, b, keep[b].flatten(), target)
                loss = whole - score_without(model, tokens, b, left.flatten(), target)
                torch.testing.assert_close(maps[b, target, row, column], loss)


def test_ablation_is_exact_where_one_token_has_nearly_all_of_the_weight():
    model, (x, keep) = random_vit(), sample()
    with torch.no_grad():
        model.last_block.attn.qkv.weight[:48].mul_(30)
        tokens = model.before_last_block(model.embed(x, keep))
        weights = model.last_block.read_weights(tokens)
    assert (weights > 1 - 1e-9).any()
    maps = AttentionRowAblation(model).attribute(x, 1, keep)
    for b, row, column in keep.nonzero().tolist():
        left = keep[b].clone()
        left[row, column] = False
        whole = score_without(model, tokens, b, keep[b].flatten(), 1)
        torch.testing.assert_close(maps[b, row, column], whole - score_without(model, tokens, b, left.flatten(), 1))


def test_to_first_order_ablation_is_its_derivative():
    model, (x, keep) = random_vit(), sample()
    exact, first = (AttentionRowAblation(model, first_order=o).attribute(x, "all", keep) for o in (False, True))
    model.head.weight.data.mul_(2)
    torch.testing.assert_close(AttentionRowAblation(model, first_order=True).attribute(x, "all", keep), 2 * first)
    # With a head of tiny weights on values that hardly differ, the two meet.
    model, (x, keep) = random_vit(), sample()
    with torch.no_grad():
        model.last_block.attn.qkv.weight[48:].mul_(1e-4)
    exact, first = (AttentionRowAblation(model, first_order=o).attribute(x, "all", keep) for o in (False, True))
    torch.testing.assert_close(exact, first, rtol=1e-2, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("explain", KINDS)
def test_targets_are_those_of_every_method_and_images_do_not_mix(explain):
    model, (x, keep) = random_vit(), sample(3)

    def maps(target, rows=slice(None)):
        return explain(model).attribute(x[rows], target, keep[rows], generator=torch.Generator().manual_seed(0))

    every = maps("all")
    torch.testing.assert_close(maps([3, 1]), every[:, [3, 1]])
    torch.testing.assert_close(maps(torch.tensor([1, 0, 3])), torch.stack([every[0, 1], every[1, 0], every[2, 3]]))
    weights = torch.randn(3, 4, dtype=torch.float64)  # one row for each image of the batch
    torch.testing.assert_close(maps(lambda z: (z * weights).sum(1)), torch.einsum("bkhw,bk->bhw", every, weights))
    torch.testing.assert_close(maps("all", slice(1, 2)), every[1:2])
    assert (every.movedim(1, 3)[~keep] == 0).all()


@pytest.mark.parametrize("explain", KINDS)
def test_models_that_read_more_than_the_row_are_refused(explain):
    model, (x, keep) = random_vit(global_pool="avg"), sample()
    with pytest.raises(ValueError, match=r"global_pool='avg'.* use IntegratedCDAM"):
        explain(model).attribute(x, 0, keep)
