"""CDAM against finite differences in float64, against autograd, and its interface."""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from small_vits import random_vit, sample
from torch import Tensor

from maskattn.explain import CDAM, Concept, IntegratedCDAM, SmoothCDAM
from maskattn.explain.attention_baselines import AttentionRow
from maskattn.explain.attention_row import AttentionRowAblation
from maskattn.explain.baselines import TokenAblation
from maskattn.explain.token_scores import score_tokens_by_autograd, score_tokens_in_closed_form
from maskattn.nn import VisionTransformer

VARIANTS = [
    {},
    {"reg_tokens": 3, "init_values": 0.3},
    {"qkv_bias": False},
    {"fc_norm": True},
    {"global_pool": "avg"},
    {"global_pool": "avg", "class_token": False, "init_values": 0.5},
]


@torch.no_grad()
def by_finite_differences(model: VisionTransformer, x: Tensor, keep: Tensor, target: int) -> Tensor:
    """S_i = d f_c / dε at ε = 0, token i of the last block's attention input being scaled by 1 + ε."""
    tokens = model.before_last_block(model.embed(x, keep))
    normed, step = model.last_block.norm1(tokens.rows_TC), 1e-5
    scores = torch.zeros(x.shape[0], *tokens.grid_HW, dtype=x.dtype)
    for row, index in enumerate(tokens.packing.indices.tolist()):
        b, place = divmod(index, tokens.packing.num_tokens)
        if place < tokens.num_prefix:
            continue
        logits = []
        for sign in (1, -1):
            scaled = normed.clone()
            scaled[row] *= 1 + sign * step
            logits.append(model.pool(model.last_block.mix(tokens, scaled))[b, target])
        place -= tokens.num_prefix
        scores[b, place // tokens.grid_HW[1], place % tokens.grid_HW[1]] = (logits[0] - logits[1]) / (2 * step)
    return scores


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", [0, 3])
def test_map_equals_finite_differences(variant, target):
    model, (x, keep) = random_vit(**variant), sample()
    expected = by_finite_differences(model, x, keep, target)
    torch.testing.assert_close(CDAM(model).attribute(x, target, keep), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("global_pool") != "avg"])
def test_closed_form_equals_autograd(variant):
    model, (x, keep) = random_vit(**variant), sample()
    tokens = model.before_last_block(model.embed(x, keep))
    closed, logits = score_tokens_in_closed_form(model, tokens, "all")
    graph, same_logits = score_tokens_by_autograd(model, tokens, "all")
    is_grid = tokens.packing.indices % tokens.packing.num_tokens >= tokens.num_prefix
    torch.testing.assert_close(closed[:, is_grid], graph[:, is_grid])
    torch.testing.assert_close(logits, same_logits)


@pytest.mark.parametrize("explain", [CDAM, partial(IntegratedCDAM, path="value"), AttentionRowAblation])
def test_maps_of_many_classes_take_few_backwards_and_are_those_of_each_class(explain, monkeypatch):
    model, (x, keep) = random_vit(num_classes=300), sample()
    method, grad, calls = explain(model), torch.autograd.grad, []
    each = torch.cat([method.attribute(x, [c], keep) for c in (0, 17, 299)], dim=1)
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **named: calls.append(1) or grad(*given, **named))
    maps = method.attribute(x, "all", keep)
    assert len(calls) <= 16
    torch.testing.assert_close(maps[:, [0, 17, 299]], each)
    one_by_one = method.attribute(x, lambda logits: logits[:, [0, 17, 299]], keep)
    torch.testing.assert_close(one_by_one, each)


@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}])
def test_targets_agree_with_each_other(variant):
    model, (x, keep) = random_vit(**variant), sample(3)
    cdam = CDAM(model)
    maps = cdam.attribute(x, "all", keep)
    assert maps.shape == (3, 4, 4, 4)
    torch.testing.assert_close(cdam.attribute(x, 2, keep), maps[:, 2])
    torch.testing.assert_close(cdam.attribute(x, [3, 1], keep), maps[:, [3, 1]])
    each = cdam.attribute(x, torch.tensor([1, 0, 3]), keep)
    torch.testing.assert_close(each, torch.stack([maps[0, 1], maps[1, 0], maps[2, 3]]))
    contrast = cdam.attribute(x, lambda logits: logits[:, 0] - 2 * logits[:, 1], keep)
    torch.testing.assert_close(contrast, maps[:, 0] - 2 * maps[:, 1])
    several = cdam.attribute(x, lambda logits: logits[:, :2], keep)
    torch.testing.assert_close(several, maps[:, :2])


@pytest.mark.parametrize("index", [np.int64(2), torch.tensor(2), torch.tensor(2, dtype=torch.int32)], ids=repr)
def test_an_index_of_numpy_or_torch_is_a_class_index(index):
    model, (x, keep) = random_vit(), sample(3)
    expected = CDAM(model).attribute(x, 2, keep)
    assert torch.equal(CDAM(model).attribute(x, index, keep), expected)
    assert torch.equal(CDAM(model).attribute(x, [index, 1], keep)[:, 0], expected)
    both = [TokenAblation(model).attribute(x, target, keep) for target in (2, index)]
    assert torch.equal(*both)


@pytest.mark.parametrize("target", [1, "all", torch.zeros(0, dtype=torch.long)], ids=str)
def test_no_images_have_no_maps(target):
    model, (x, _) = random_vit(), sample()
    assert CDAM(model).attribute(x[:0], target).shape[-3:] == ((0, 4, 4) if target != "all" else (4, 4, 4))


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("attn_drop_rate", "attn"),
        ("proj_drop_rate", "proj_drop"),
        ("drop_path_rate", "drop_path1"),
        ("drop_rate", "head"),
    ],
)
@pytest.mark.parametrize("explain", [CDAM, SmoothCDAM, IntegratedCDAM, TokenAblation, AttentionRow])
def test_a_model_that_drops_at_random_is_refused_until_it_is_in_eval_mode(explain, option, part):
    model, (x, keep) = random_vit(**{option: 0.5}), sample()
    model.train()
    with pytest.raises(ValueError, match=f"{part}.* has active dropout"):
        explain(model).attribute(x, 0, keep)
    assert explain(model.eval()).attribute(x, 0, keep).shape == (2, 4, 4)


def test_a_concept_is_not_made_of_what_a_model_drops_at_random():
    model, (x, _) = random_vit(drop_path_rate=0.5), sample()
    with pytest.raises(ValueError, match=r"drop_path1.* has active dropout"):
        Concept.from_images(model.train(), x)


def test_a_model_that_never_drops_may_be_in_training_mode():
    model, (x, keep) = random_vit(), sample()
    expected = CDAM(model).attribute(x, 0, keep)
    assert torch.equal(CDAM(model.train()).attribute(x, 0, keep), expected)


def test_of_the_gradients_of_all_classes_only_two_exist_at_a_time(monkeypatch):
    model, (x, keep) = random_vit(global_pool="avg", num_classes=6), sample()
    given, most, grad = [], 0, torch.autograd.grad

    def counting(scores, inputs, *arguments, **options):
        nonlocal most
        gradients = grad(scores, inputs, *arguments, **options)
        if "materialize_grads" in options:  # not those that the attention's own backward takes
            given.extend(map(weakref.ref, gradients))
            most = max(most, sum(one() is not None for one in given))
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", counting)
    assert CDAM(model).attribute(x, "all", keep).shape[1] == 6
    assert 0 < most <= 2


def test_similarity_to_a_concept_can_be_explained_without_a_head():
    model, (x, keep) = random_vit(num_classes=0), sample()
    concept = torch.randn(24, dtype=torch.float64)
    maps = CDAM(model).attribute(x, lambda z: z @ concept, keep)
    assert maps.shape == (2, 4, 4)
    assert maps.abs().sum() > 0


def test_a_target_that_ignores_the_output_gives_zero():
    model, (x, keep) = random_vit(), sample()
    assert (CDAM(model).attribute(x, lambda z: torch.ones(len(z)), keep) == 0).all()


def test_background_is_zero_and_never_read():
    model, (x, keep) = random_vit(), sample()
    background = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(x)
    maps = CDAM(model).attribute(x, "all", keep)
    poisoned = CDAM(model).attribute(x.masked_fill(background, float("nan")), "all", keep)
    assert torch.equal(maps, poisoned)
    assert (maps.movedim(1, 3)[~keep] == 0).all()


def test_maps_of_images_do_not_depend_on_their_batch():
    model, (x, keep) = random_vit(), sample(3)
    together = CDAM(model).attribute(x, 1, keep)
    alone = torch.cat([CDAM(model).attribute(x[b : b + 1], 1, keep[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(together, alone)


def test_nothing_is_left_on_the_model_or_its_inputs():
    model, (x, keep) = random_vit(), sample()
    x.requires_grad_()
    for target in (0, "all"):
        assert not CDAM(model).attribute(x, target, keep).requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())


def test_an_image_without_tissue_has_a_map_of_zeros():
    for variant in ({}, {"global_pool": "avg"}):
        model, (x, keep) = random_vit(**variant), sample()
        assert (CDAM(model).attribute(x, 0, torch.zeros_like(keep)) == 0).all()


def test_images_that_are_not_square_have_maps_of_their_shape():
    x = torch.randn(1, 3, 32, 80, dtype=torch.float64)
    assert CDAM(random_vit()).attribute(x, 0).shape == (1, 2, 5)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (4, ValueError, "0 … 3"),
        ([0, -1], ValueError, "0 … 3"),
        ("every", ValueError, "'all'"),
        (torch.tensor([1, 2, 3]), ValueError, "one class index for each image"),
        (torch.tensor([0.5, 1.0]), ValueError, "integers"),
        ([], TypeError, "target must be"),
        (True, TypeError, "target must be"),
        (1.0, TypeError, "target must be"),
        (np.array([1, 2]), TypeError, "target must be"),
        (lambda z: z.sum(), ValueError, "must return"),
    ],
)
def test_wrong_targets_are_named(target, error, message):
    model, (x, keep) = random_vit(), sample()
    with pytest.raises(error, match=message):
        CDAM(model).attribute(x, target, keep)
