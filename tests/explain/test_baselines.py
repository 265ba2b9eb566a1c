"""Methods of comparison against their definitions, written out on dense models, and their common interface."""

from __future__ import annotations

import pytest
import torch
from dense_vit import _dense_tokens
from small_vits import random_vit, sample
from torch import Tensor

from maskattn.explain import AttentionMap
from maskattn.explain.attention_baselines import AttentionRollout, AttentionRow, RelevancePropagation
from maskattn.explain.baselines import RISE, InputXGradient, IntegratedGradients, SmoothGrad, TokenAblation
from maskattn.nn import VisionTransformer

pytest.importorskip("captum")

QUICK = {
    "attention": AttentionRow,
    "rollout": AttentionRollout,
    "propagation": RelevancePropagation,
    "input×gradient": InputXGradient,
    "integrated gradients": lambda model: IntegratedGradients(model, m=3),
    "smoothgrad": lambda model: SmoothGrad(model, m=3),
    "ablation": lambda model: TokenAblation(model, internal_batch_size=5),
    "rise": lambda model: RISE(model, m=20, internal_batch_size=7),
}
SAME_FOR_ALL_TARGETS = {"attention", "rollout"}


def dense_attention(model: VisionTransformer, x: Tensor, keep: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of a class-token model and each block's attention weights, in the graph of the logits."""
    tokens, present = _dense_tokens(model, x, keep)
    weights = []
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(tokens))
        q, k, v = qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~present[:, None, None, :], float("-inf"))
        weights.append(scores.softmax(-1))
        tokens = tokens + block.ls1(block.attn.proj((weights[-1] @ v).transpose(1, 2).flatten(2)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.head(model.norm(tokens)[:, 0]), weights


def test_relevance_propagation_follows_its_recursion():
    model, (x, keep) = random_vit(reg_tokens=1), sample()
    got = RelevancePropagation(model).attribute(x, "all", keep)
    logits, weights = dense_attention(model, x, keep)
    torch.testing.assert_close(logits, model(x, keep))
    for target in range(4):
        relevance = torch.eye(18, dtype=x.dtype).expand(2, -1, -1)
        for a, g in zip(weights, torch.autograd.grad(logits[:, target].sum(), weights, retain_graph=True), strict=True):
            relevance = relevance + (a * g).clamp(min=0).mean(dim=1) @ relevance
        torch.testing.assert_close(got[:, target], relevance[:, 0, 2:].unflatten(1, (4, 4)) * keep)


def test_rollout_is_the_product_of_half_attention_and_half_identity():
    model, (x, keep) = random_vit(), sample()
    _, weights = dense_attention(model, x, keep)
    first, second = (0.5 * a.mean(dim=1) + 0.5 * torch.eye(17, dtype=x.dtype) for a in weights)
    expected = (second @ first)[:, 0, 1:].unflatten(1, (4, 4)) * keep
    torch.testing.assert_close(AttentionRollout(model).attribute(x, 0, keep), expected.detach())


def test_attention_row_is_the_attention_map_for_every_target():
    model, (x, keep) = random_vit(), sample()
    maps = AttentionRow(model).attribute(x, "all", keep)
    assert torch.equal(maps[:, 2], AttentionMap(model).attribute(x, keep))


def test_ablation_is_the_loss_of_score_without_a_token():
    model, (x, keep) = random_vit(), sample()
    got = TokenAblation(model).attribute(x, 1, keep)
    for b, row, column in keep.nonzero().tolist():
        without = keep[b : b + 1].clone()
        without[0, row, column] = False
        loss = model(x[b : b + 1], keep[b : b + 1]) - model(x[b : b + 1], without)
        torch.testing.assert_close(got[b, row, column], loss[0, 1].detach())


def test_input_times_gradient_sums_pixels_over_tokens():
    model, (x, keep) = random_vit(), sample()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, keep)[:, 3].sum(), x)
    pixels = (x * gradient).sum(dim=1).unflatten(1, (4, 16)).unflatten(3, (4, 16)).sum(dim=(2, 4))
    torch.testing.assert_close(InputXGradient(model).attribute(x.detach(), 3, keep), pixels.detach())
    noiseless = SmoothGrad(model, m=2, noise=0.0).attribute(x.detach(), 3, keep)
    torch.testing.assert_close(noiseless, pixels.detach())


def test_integrated_gradients_add_up_to_the_difference_from_a_zero_image():
    model, (x, keep) = random_vit(), sample()
    maps = IntegratedGradients(model, m=200).attribute(x, 0, keep)
    difference = (model(x, keep) - model(torch.zeros_like(x), keep))[:, 0].detach()
    torch.testing.assert_close(maps.sum(dim=(1, 2)), difference, rtol=0.02, atol=0.02)


def test_rise_finds_the_token_that_alone_decides():
    class OneToken(VisionTransformer):
        def predict(self, tokens):
            return tokens.rows_TC.view(-1, 17, 24)[:, 6, :4]  # prefix, then token 5 of the grid: row 1, column 1

    model = OneToken(img_size=64, embed_dim=24, depth=1, num_heads=3, num_classes=4, pos_embed="none").eval()
    x = torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        model.patch_embed.proj.weight.fill_(1.0)
    maps = RISE(model, m=1000, cells=4).attribute(x, 2)
    assert maps.flatten().argmax() == 5


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}, {"pos_embed": "rotary"}], ids=str)
def test_every_method_has_the_interface_of_cdam(name, variant):
    model, (x, keep) = random_vit(**variant).float(), sample(3)
    x, explain = x.float(), QUICK[name](model)

    def attribute(target):
        return explain.attribute(x, target, keep, generator=torch.Generator().manual_seed(0))

    maps = attribute("all")
    assert maps.shape == (3, 4, 4, 4)
    assert maps.isfinite().all()
    assert not maps.requires_grad
    assert (maps.movedim(1, 3)[~keep] == 0).all()
    assert (maps != 0).any()
    torch.testing.assert_close(attribute(2), maps[:, 2])
    each = attribute(torch.tensor([1, 0, 3]))
    torch.testing.assert_close(each, torch.stack([maps[0, 1], maps[1, 0], maps[2, 3]]))
    assert torch.equal(maps[:, 0], maps[:, 1]) == (name in SAME_FOR_ALL_TARGETS)
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["smoothgrad", "rise"])
def test_the_same_generator_gives_the_same_map_another_does_not_and_torchs_own_is_left_alone(name):
    model, (x, keep) = random_vit().float(), sample()
    explain, state = QUICK[name](model), torch.get_rng_state()
    maps = [explain.attribute(x.float(), 0, keep, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["smoothgrad", "rise"])
def test_without_a_generator_torchs_own_decides(name):
    model, (x, keep) = random_vit().float(), sample()
    maps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        maps.append(QUICK[name](model).attribute(x.float(), 0, keep))
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


def test_alibi_is_refused_where_it_is_not_known():
    model, (x, keep) = random_vit(pos_embed="alibi"), sample()
    with pytest.raises(ValueError, match="alibi"):
        AttentionRollout(model).attribute(x, 0, keep)


@pytest.mark.parametrize("name", QUICK)
def test_images_without_tissue_and_poisoned_background_do_no_harm(name):
    model, (x, keep) = random_vit(), sample()
    keep[0] = False
    background = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(x)

    def attribute(images):
        return QUICK[name](model).attribute(images, 1, keep, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        maps = attribute(x)
    assert (maps[0] == 0).all()
    assert (maps[1] != 0).any()
    if name not in ("integrated gradients", "smoothgrad"):  # these compute with all pixels
        assert torch.equal(attribute(x.masked_fill(background, torch.nan)), maps)
