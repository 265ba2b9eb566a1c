"""Methods that read the last attention row, against every subset and every token dropped, in float64."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from small_vits import random_vit, sample

from maskattn.explain.attention_row import (
    AttentionRowAblation,
    AttentionRowShapley,
    SampledRowShapley,
)
from maskattn.explain.token_subsets import take_subsets

MODELS = [{}, {"reg_tokens": 2, "init_values": 0.3}, {"pos_embed": "rotary"}, {"qk_norm": True}, {"qkv_bias": False}]
KINDS = [AttentionRowAblation, AttentionRowShapley, SampledRowShapley]


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


def by_every_order(model, tokens, b: int, keep_N, target: int):
    """The Shapley value of each kept token: its mean gain over every order in which they enter."""
    players = keep_N.nonzero().flatten().tolist()
    scores = {}

    def score(members):
        if members not in scores:
            present = torch.zeros_like(keep_N)
            present[list(members)] = True
            scores[members] = score_without(model, tokens, b, present, target)
        return scores[members]

    gains = torch.zeros(len(keep_N), dtype=torch.float64)
    orders = list(permutations(players))
    for order in orders:
        for place, player in enumerate(order):
            gains[player] += score(frozenset(order[: place + 1])) - score(frozenset(order[:place]))
    return gains / len(orders)


def test_sampled_orders_tend_to_the_shapley_value_and_each_is_complete():
    model, (x, _) = random_vit(), sample(1)
    keep = torch.zeros(1, 4, 4, dtype=torch.bool)
    keep[0, 0, :3] = keep[0, 2, 1] = keep[0, 3, 3] = True
    with torch.no_grad():
        tokens = model.before_last_block(model.embed(x, keep))
    exact = by_every_order(model, tokens, 0, keep.flatten(), 1).view(4, 4)
    maps = SampledRowShapley(model, m=300).attribute(x, 1, keep, generator=torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(maps, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    few = SampledRowShapley(model, m=1, internal_batch_size=2).attribute(x, 1, keep)[0]
    torch.testing.assert_close(few.sum(), exact.sum())


@pytest.mark.parametrize("variant", MODELS, ids=str)
def test_the_path_of_membership_sums_to_the_difference_of_its_ends(variant):
    explain = AttentionRowShapley
    model, (x, keep) = random_vit(**variant), sample()
    gaps = [explain(model, m).attribute(x, "all", keep, return_convergence_gap=True)[1].abs().max() for m in (2, 60)]
    assert gaps[1] < 1e-5
    assert gaps[1] < 0.1 * gaps[0]


def test_the_path_of_membership_is_the_limit_of_the_shapley_value_for_many_tokens():
    """Each token stands for many: split into equal copies, whose Shapley values sum to the path's value."""
    model = random_vit(img_size=256, num_heads=2, embed_dim=16, pos_embed="none")
    x = torch.randn(1, 3, 16, 48, dtype=torch.float64)
    path = AttentionRowShapley(model, m=80)
    copied = x.repeat(1, 1, 12, 1)  # every column of tokens twelve times
    exact = path.attribute(copied, 1)[0]
    sampled = SampledRowShapley(model, m=150).attribute(copied, 1, generator=torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(sampled.sum(0), exact.sum(0), rtol=0.1, atol=0.1 * float(exact.sum(0).abs().max()))


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
