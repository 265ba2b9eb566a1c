"""The path of weights: the map against its definition written out, its sum, and its invariances."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_within_budget
from small_vits import random_vit, sample
from torch import Tensor

from maskattn.explain import METHODS, IntegratedCDAM
from maskattn.explain.integrated import gauss_legendre
from maskattn.nn import VisionTransformer
from maskattn.nn.positions import alibi_slopes

MODELS = [{}, {"reg_tokens": 2, "init_values": 0.3}, {"pos_embed": "rotary"}, {"qk_norm": True}, {"pos_embed": "alibi"}]
POOLED = [
    {"global_pool": "avg"},
    {"global_pool": "token_avg"},
    {"global_pool": "map"},
    {"global_pool": "coca", "pool_dim": 16, "pool_heads": 2},
    {"global_pool": "avg", "qk_norm": True},
]
POOLED += [{"global_pool": "avg", "pos_embed": "alibi"}, {"global_pool": "avg", "pos_embed": "rotary"}]


def tokens_of(model: VisionTransformer, x: Tensor, keep: Tensor):
    """One image's last input."""
    with torch.no_grad():
        return model.before_last_block(model.embed(x, keep))


def written_out(model: VisionTransformer, x: Tensor, keep: Tensor, target: int, m: int) -> Tensor:
    """The map (H, W) of one image: every attention weight and its derivative along the path by itself.

    A token's integrand is Σ_j [ a_ji v̇_i·g_j + ȧ_ji (v_i − o_j)·g_j ], g_j the gradient at what token j reads.
    """
    tokens = tokens_of(model, x, keep)
    block = model.last_block
    attn = block.attn
    T = block.norm1(tokens.rows_TC).detach()
    distance = 0.0
    if tokens.coords_T2 is not None:
        gaps = (tokens.coords_T2[:, None] - tokens.coords_T2[None]).norm(dim=-1).nan_to_num()
        distance = -alibi_slopes(attn.num_heads, tokens.coords_T2)[:, None, None] * gaps

    def weights_and_values(alpha: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = attn.queries_keys_and_values(alpha * T, tokens)
        scores = torch.einsum("jhd,ihd->hji", q, k) * q.shape[-1] ** -0.5 + distance
        return scores.softmax(dim=-1), v

    total = torch.zeros(len(T), dtype=x.dtype)
    for alpha, weight in zip(*gauss_legendre(m, T), strict=True):
        (a, v), (a_grows, v_grows) = torch.autograd.functional.jvp(weights_and_values, alpha, torch.ones_like(alpha))
        out = torch.einsum("hji,ihd->jhd", a, v).detach().requires_grad_()
        rows = block.feed_forward(tokens.rows_TC + block.ls1(attn.project(out)), tokens.packing)
        (g,) = torch.autograd.grad(model.pool(tokens.with_rows(rows))[0, target], out)
        of_values = torch.einsum("hji,ihd,jhd->i", a, v_grows, g)
        of_weights = torch.einsum("hji,jihd,jhd->i", a_grows, v[None] - out[:, None], g)
        total += weight * (of_values + of_weights).detach()
    dense = total.new_zeros(tokens.packing.num_tokens).index_copy_(0, tokens.packing.indices.long(), total)
    return dense[tokens.num_prefix :].view(tokens.grid_HW)


@pytest.mark.parametrize("variant", MODELS + POOLED, ids=str)
def test_the_map_equals_its_definition_written_out(variant):
    model, (x, keep) = random_vit(**variant), sample()
    single = random_vit(**variant).float()
    single.load_state_dict(model.state_dict())
    exact, same = (
        torch.stack([written_out(net, images[b : b + 1], keep[b : b + 1], 1, 6) for b in range(len(x))])
        for net, images in ((model, x), (single, x.float()))
    )
    explainer = IntegratedCDAM(single, m=6, path="weights", internal_batch_size=4)
    assert_within_budget(explainer.attribute(x.float(), 1, keep), exact, same, str(variant))
    torch.testing.assert_close(IntegratedCDAM(model, m=6, path="weights").attribute(x, 1, keep), exact)


@pytest.mark.parametrize("variant", MODELS + POOLED, ids=str)
def test_it_sums_to_the_difference_that_the_path_in_the_norm_sums_to(variant):
    model, (x, keep) = random_vit(**variant), sample()
    tokens = tokens_of(model, x, keep)
    accounts = [IntegratedCDAM(model, m=30, path=path).account(model, tokens, "all") for path in ("norm", "weights")]
    norm, weights = accounts
    torch.testing.assert_close(weights.difference_BM, norm.difference_BM)
    torch.testing.assert_close(weights.gap_BM, norm.gap_BM, rtol=0, atol=1e-9)
    assert weights.gap_BM.abs().max() < 1e-6
    assert (weights.relevance_MT - norm.relevance_MT).abs().max() > 1e-4


@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}], ids=str)
def test_a_direction_that_all_tokens_share_moves_the_path_in_the_norm_and_not_this_map(variant):
    """Keys gain the same vector in every token, so that scores gain a constant, which no softmax sees."""
    model, (x, keep) = random_vit(**variant), sample(1)
    block = model.last_block
    with torch.no_grad():  # the last channel of T is 1 in every token, and nothing but keys reads it
        block.norm1.weight[-1], block.norm1.bias[-1] = 0, 1
        block.attn.qkv.weight[:, -1] = 0
        explain = {path: IntegratedCDAM(model, m=8, path=path) for path in ("norm", "weights")}
        logits, maps = model(x, keep), {path: one.attribute(x, 1, keep) for path, one in explain.items()}
        dim = model.embed_dim
        block.attn.qkv.weight[dim : 2 * dim, -1] = torch.randn(dim, dtype=x.dtype)
        torch.testing.assert_close(model(x, keep), logits)
        torch.testing.assert_close(explain["weights"].attribute(x, 1, keep), maps["weights"])
        moved = explain["norm"].attribute(x, 1, keep) - maps["norm"]
    assert moved.abs().max() > 1e-3 * maps["norm"].abs().max()


def test_a_last_block_with_a_foreign_attention_is_refused():
    model, (x, keep) = random_vit(global_pool="avg"), sample()

    class Foreign(torch.nn.Module):
        def forward(self, rows, tokens):
            return rows

    model.last_block.attn = Foreign()
    with pytest.raises(ValueError, match="this package's own attention"):
        IntegratedCDAM(model, path="weights").attribute(x, 0, keep)


def test_the_method_has_its_name():
    model, (x, keep) = random_vit(), sample()
    by_name = METHODS["integrated-weights"](model).attribute(x, 2, keep)
    torch.testing.assert_close(by_name, IntegratedCDAM(model, m=8, path="weights").attribute(x, 2, keep))
