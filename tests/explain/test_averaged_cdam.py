"""Smooth and Integrated CDAM against their definitions, term by term, and their interface."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracles import assert_within_budget
from small_vits import random_vit, sample
from torch import Tensor

from maskattn.explain import CDAM, IntegratedCDAM, SmoothCDAM, token_subsets
from maskattn.explain.explainer import as_maps
from maskattn.explain.token_scores import (
    score_class_token_queries,
    score_tokens_by_autograd,
    score_tokens_in_closed_form,
)
from maskattn.explain.token_subsets import copies_at_once
from maskattn.nn import VisionTransformer
from maskattn.nn.positions import alibi_slopes
from maskattn.packing import pack, unpack

MODELS = [{}, {"reg_tokens": 2, "init_values": 0.3}, {"pos_embed": "rotary"}, {"qk_norm": True}, {"pos_embed": "alibi"}]
POOLED = [{"global_pool": "avg"}, {"global_pool": "token_avg"}, {"global_pool": "map"}]
POOLED += [{"global_pool": "coca", "pool_dim": 16, "pool_heads": 2}]


def by_definition(model: VisionTransformer, x: Tensor, keep: Tensor, target: int, variants) -> Tensor:
    """Σ weight·Σ_j factor·T_ij·∂f/∂T_ij through all of the last block, T = norm(input), one variant after the other.

    ``variants(tokens)`` gives (weight, input of the block, scale of T).
    """
    tokens = model.before_last_block(model.embed(x, keep))
    total = torch.zeros(x.shape[0], *tokens.grid_HW, dtype=x.dtype)
    for weight, rows, scale in variants(tokens):
        at = tokens.with_rows(rows.detach())
        normed = (scale * model.last_block.norm1(at.rows_TC)).detach().requires_grad_()
        logits = model.pool(model.last_block.mix(at, normed))
        (gradient,) = torch.autograd.grad(logits[:, target].sum(), normed)
        scores = (normed * gradient).sum(dim=1).detach()
        dense = scores.new_zeros(x.shape[0] * tokens.packing.num_tokens)
        dense[tokens.packing.indices] = scores
        total += weight * dense.view(x.shape[0], -1)[:, tokens.num_prefix :].view_as(total)
    return total


def input_path(m: int):
    return lambda tokens: [(1 / m, k / m * tokens.rows_TC, 1.0) for k in range(1, m + 1)]


def noisy(m: int, noise: float, seed: int):
    def variants(tokens):
        generator = torch.Generator().manual_seed(seed)
        x, starts = tokens.rows_TC, tokens.packing.cu_seqlens.tolist()
        for _ in range(m):
            draw = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.dtype)
            rows = x.clone()
            for first, end in pairwise(starts):
                own = x[first:end]
                rows[first:end] += noise * (own.max() - own.min()) * draw[first:end]
            yield 1 / m, rows, 1.0

    return variants


def double_and_single(variant: dict) -> tuple[VisionTransformer, VisionTransformer]:
    model = random_vit(**variant)
    single = random_vit(**variant).float()
    single.load_state_dict(model.state_dict())
    return model, single


@pytest.mark.parametrize("variant", MODELS + POOLED, ids=str)
@pytest.mark.parametrize("kind", ["smooth", "integrated"])
def test_maps_equal_their_definition(variant, kind):
    (model, single), (x, keep) = double_and_single(variant), sample()
    if kind == "smooth":
        variants = noisy(3, 0.05, 7)
        options = {"generator": torch.Generator().manual_seed(7)}
        got = SmoothCDAM(single, m=3, internal_batch_size=4).attribute(x.float(), 1, keep, **options)
    else:
        variants = input_path(5)
        got = IntegratedCDAM(single, m=5, internal_batch_size=4).attribute(x.float(), 1, keep)
    exact = by_definition(model, x, keep, 1, variants)
    same = by_definition(single, x.float(), keep, 1, variants)
    assert_within_budget(got, exact, same, f"{kind} {variant}")


@pytest.mark.parametrize("variant", MODELS + POOLED, ids=str)
def test_the_path_in_the_norm_is_captums_integrated_gradients_there(variant):
    captum, (model, single), (x, keep) = pytest.importorskip("captum.attr"), double_and_single(variant), sample()

    def oracle(model: VisionTransformer, x: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = model.before_last_block(model.embed(x, keep))
            normed = model.last_block.norm1(tokens.rows_TC)[None].requires_grad_()

        def logit(steps_STC: Tensor) -> Tensor:
            return torch.stack([model.pool(model.last_block.mix(tokens, at))[:, 1].sum() for at in steps_STC])

        scores = captum.IntegratedGradients(logit).attribute(normed, n_steps=6, method="gausslegendre")[0].sum(dim=1)
        return as_maps(scores[None].detach().to(x.dtype), tokens)[:, 0]

    got = IntegratedCDAM(single, m=6, path="norm", internal_batch_size=4).attribute(x.float(), 1, keep)
    assert_within_budget(got, oracle(model, x), oracle(single, x.float()), str(variant))


@pytest.mark.parametrize("variant", MODELS + POOLED, ids=str)
@pytest.mark.parametrize("path", ["norm", "weights", "value"])
def test_on_complete_paths_scores_add_up_to_the_difference_of_the_ends(variant, path):
    model, (x, keep) = random_vit(**variant), sample()
    gaps = []
    for m in (2, 40):
        maps, gap = IntegratedCDAM(model, m=m, path=path).attribute(x, "all", keep, return_convergence_gap=True)
        assert maps.shape == (2, 4, 4, 4)
        assert gap.shape == (2, 4)
        gaps.append(gap.abs().max())
    assert gaps[1] < 1e-6
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize("variant", MODELS + POOLED, ids=str)
def test_the_path_of_values_is_captums_integrated_gradients_of_them(variant):
    captum, (model, single), (x, keep) = pytest.importorskip("captum.attr"), double_and_single(variant), sample()

    def oracle(model: VisionTransformer, x: Tensor) -> Tensor:
        block = model.last_block
        with torch.no_grad():
            tokens = model.before_last_block(model.embed(x, keep))
            q, k, v = block.attn.queries_keys_and_values(block.norm1(tokens.rows_TC), tokens)
            bias = block.attn.qkv.bias.chunk(3)[2].unflatten(0, v.shape[1:])
            present = unpack(torch.ones_like(v[:, :1, 0]), tokens.packing)[..., 0] > 0
            q, k = (unpack(y, tokens.packing).transpose(1, 2) for y in (q, k))
            scores = q @ k.mT * q.shape[-1] ** -0.5 + distance_bias(model, tokens, present)
            weights = scores.masked_fill(~present[:, None, None], -torch.inf).softmax(-1).nan_to_num()

        def logit(steps_STHD: Tensor) -> Tensor:
            scores = []
            for values in steps_STHD:
                out = weights @ unpack(values, tokens.packing).transpose(1, 2)
                update = block.ls1(block.attn.project(pack(out.transpose(1, 2), tokens.packing)))
                rows = block.feed_forward(tokens.rows_TC + update, tokens.packing)
                scores.append(model.pool(tokens.with_rows(rows))[:, 1].sum())
            return torch.stack(scores)

        explain = captum.IntegratedGradients(logit)
        gradients = explain.attribute(v[None], baselines=bias[None, None], n_steps=6, method="gausslegendre")
        return as_maps(gradients[0].sum(dim=(1, 2))[None].detach().to(x.dtype), tokens)[:, 0]

    got = IntegratedCDAM(single, m=6, path="value", internal_batch_size=4).attribute(x.float(), 1, keep)
    assert_within_budget(got, oracle(model, x), oracle(single, x.float()), str(variant))


def distance_bias(model: VisionTransformer, tokens, present: Tensor) -> Tensor:
    """ALiBi's term of the scores (B, H, L, L), 0 for tokens without a position."""
    if tokens.coords_T2 is None:
        return torch.zeros((), dtype=tokens.rows_TC.dtype)
    places = unpack(tokens.coords_T2.nan_to_num(nan=1e6), tokens.packing)
    distance = (places[:, :, None] - places[:, None]).norm(dim=-1)
    far = (places.abs() > 1e5).any(-1)
    distance = distance.masked_fill(far[:, :, None] | far[:, None], 0)
    slopes = alibi_slopes(model.num_heads, tokens.coords_T2)
    return -slopes[:, None, None] * distance[:, None]


def test_the_path_at_the_input_has_no_gap_to_report():
    model, (x, keep) = random_vit(), sample()
    with pytest.raises(ValueError, match="path='norm'"):
        IntegratedCDAM(model, m=2).attribute(x, 0, keep, return_convergence_gap=True)


def test_the_class_tokens_score_is_the_sum_of_its_key_and_value_term_and_its_query_term():
    model, (x, keep) = random_vit(reg_tokens=1), sample()
    with torch.no_grad():
        tokens = model.before_last_block(model.embed(x, keep))
        normed = model.last_block.norm1(tokens.rows_TC)
    closed, _ = score_tokens_in_closed_form(model, tokens, "all")
    queries = score_class_token_queries(model, tokens, "all", normed)
    whole, _ = score_tokens_by_autograd(model, tokens, "all")
    first = tokens.packing.cu_seqlens[:-1].long()
    torch.testing.assert_close(closed[:, first] + queries.T, whole[:, first])


@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}], ids=str)
def test_results_do_not_depend_on_the_size_of_internal_batches(variant):
    model, (x, keep) = random_vit(**variant), sample()
    for explain in (
        lambda size: SmoothCDAM(model, m=5, internal_batch_size=size).attribute(
            x, "all", keep, generator=torch.Generator().manual_seed(3)
        ),
        lambda size: IntegratedCDAM(model, m=5, internal_batch_size=size).attribute(x, "all", keep),
        lambda size: IntegratedCDAM(model, m=5, path="norm", internal_batch_size=size).attribute(x, "all", keep),
        lambda size: IntegratedCDAM(model, m=5, path="weights", internal_batch_size=size).attribute(x, "all", keep),
        lambda size: IntegratedCDAM(model, m=5, path="value", internal_batch_size=size).attribute(x, "all", keep),
    ):
        torch.testing.assert_close(explain(1), explain(100))


@pytest.mark.parametrize(("size", "batches"), [(1, [2] * 5), (4, [4, 4, 2]), (7, [6, 4]), (100, [10])])
@pytest.mark.parametrize(
    "explain",
    [
        lambda model, size: SmoothCDAM(model, m=5, internal_batch_size=size),
        lambda model, size: IntegratedCDAM(model, m=5, internal_batch_size=size),
        lambda model, size: IntegratedCDAM(model, m=5, path="norm", internal_batch_size=size),
        lambda model, size: IntegratedCDAM(model, m=5, path="weights", internal_batch_size=size),
        lambda model, size: IntegratedCDAM(model, m=5, path="value", internal_batch_size=size),
    ],
    ids=["smooth", "input", "norm", "weights", "value"],
)
def test_no_more_than_internal_batch_size_copies_are_in_the_head_at_a_time(explain, size, batches):
    model, (x, keep) = random_vit(), sample()
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    explain(model, size).attribute(x, 0, keep)
    assert seen == batches  # the whole batch of two at least


@pytest.mark.parametrize(
    ("explain", "whole"),
    [
        (lambda model: SmoothCDAM(model, m=5), True),
        (lambda model: IntegratedCDAM(model, m=5), True),
        (lambda model: IntegratedCDAM(model, m=5, path="norm"), False),
        (lambda model: IntegratedCDAM(model, m=5, path="weights"), False),
        (lambda model: IntegratedCDAM(model, m=5, path="value"), False),
    ],
    ids=["smooth", "input", "norm", "weights", "value"],
)
def test_batches_are_by_tokens_where_whole_images_go_through_the_last_block(explain, whole, monkeypatch):
    x, keep = sample()
    for variant in ({}, {"global_pool": "avg"}):
        model, seen = random_vit(**variant), []
        model.head.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        tokens = int(model.embed(x, keep).packing.total)
        for tokens_at_once, batches in (
            (8_192, [10]),
            (2 * tokens, [4, 4, 2]),
            (2 * tokens - 1, [2] * 5),
            (1, [2] * 5),  # the whole batch at least
        ):
            monkeypatch.setattr(token_subsets, "_TOKENS_AT_ONCE", tokens_at_once)
            seen.clear()
            explain(model).attribute(x, 0, keep)
            assert seen == (batches if whole or variant else [10])  # else the class tokens alone
        monkeypatch.setattr(token_subsets, "_CLASS_TOKENS_AT_ONCE", 4)
        seen.clear()
        explain(model).attribute(x, 0, keep)
        assert seen == ([2] * 5 if whole or variant else [4, 4, 2])
        monkeypatch.undo()


def test_processes_with_parts_of_the_tokens_divide_copies_alike():
    model, (x, keep) = random_vit(), sample()
    tokens = model.embed(x, keep)
    all_of_them = tokens.packing.batch_size * tokens.packing.num_tokens
    assert copies_at_once(tokens, None) == 8_192 // tokens.packing.total
    for part in (1, 5, tokens.packing.total):
        packing = replace(tokens.packing, indices=tokens.packing.indices[:part])
        divided = replace(tokens, packing=packing, shards=object())
        assert copies_at_once(divided, None) == 8_192 // all_of_them


def test_without_noise_smooth_is_plain():
    model, (x, keep) = random_vit(), sample()
    torch.testing.assert_close(SmoothCDAM(model, m=2, noise=0).attribute(x, 2, keep), CDAM(model).attribute(x, 2, keep))


def test_the_same_generator_gives_the_same_map_and_another_does_not():
    model, (x, keep) = random_vit(), sample()
    maps = [
        SmoothCDAM(model, m=2).attribute(x, 0, keep, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


@pytest.mark.parametrize("explain", [SmoothCDAM, IntegratedCDAM])
def test_targets_are_those_of_cdam(explain):
    model, (x, keep) = random_vit(), sample(3)

    def maps(target):
        options = {"generator": torch.Generator().manual_seed(0)} if explain is SmoothCDAM else {}
        return explain(model, m=3, internal_batch_size=3).attribute(x, target, keep, **options)

    every = maps("all")
    assert every.shape == (3, 4, 4, 4)
    torch.testing.assert_close(maps([3, 1]), every[:, [3, 1]])
    torch.testing.assert_close(maps(torch.tensor([1, 0, 3])), torch.stack([every[0, 1], every[1, 0], every[2, 3]]))
    weights = torch.randn(3, 4, dtype=torch.float64)  # one row for each image of the batch
    torch.testing.assert_close(maps(lambda z: (z * weights).sum(1)), torch.einsum("bkhw,bk->bhw", every, weights))


def test_background_stays_zero_and_the_model_is_left_unchanged():
    model, (x, keep) = random_vit(), sample()
    for explain in (SmoothCDAM(model, m=2), IntegratedCDAM(model, m=2), IntegratedCDAM(model, m=2, path="norm")):
        maps = explain.attribute(x, 0, keep)
        assert (maps[~keep] == 0).all()
        assert (maps[keep] != 0).any()
        assert not maps.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: SmoothCDAM(model, m=0), "m and internal_batch_size must be at least 1, got m=0"),
        (lambda model: SmoothCDAM(model, noise=-1.0), "noise=-1.0"),
        (lambda model: IntegratedCDAM(model, internal_batch_size=0), "internal_batch_size=0"),
        (lambda model: IntegratedCDAM(model, path="straight"), "path='straight'"),
    ],
)
def test_wrong_numbers_and_paths_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(random_vit())
