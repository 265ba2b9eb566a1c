"""Explanations of models with hooks, adapters or patches: they explain what the model computes, or refuse."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from small_vits import random_vit, sample
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskattn.explain import CDAM, AttentionMap, IntegratedCDAM, SmoothCDAM
from maskattn.explain.attention_baselines import AttentionRollout, RelevancePropagation
from maskattn.explain.last_block import input_of_attention, output_from
from maskattn.nn import VisionTransformer


class LowRank(nn.Module):
    """A layer with an adapter beside it, which still shows the layer's weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.update = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)
    in_features = property(lambda self: self.layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.update(x)


def adapted_and_merged(**arguments: object) -> tuple[VisionTransformer, VisionTransformer]:
    """A model with adapters in every block, and the plain model of the same function."""
    model = random_vit(**arguments)
    merged = copy.deepcopy(model)
    for block, plain in zip(model.blocks, merged.blocks, strict=True):
        for part in ("qkv", "proj"):
            adapter = LowRank(getattr(block.attn, part))
            setattr(block.attn, part, adapter)
            with torch.no_grad():
                getattr(plain.attn, part).weight.add_(adapter.update.weight)
    return model, merged


VARIANTS = [{}, {"global_pool": "avg"}, {"pos_embed": "rotary", "qk_norm": True, "embed_dim": 48}]


def by_autograd(model: VisionTransformer, x: Tensor, keep: Tensor, target: int) -> Tensor:
    """CDAM by its definition: every token's share of the score, including the class token's query."""
    tokens = model.before_last_block(model.embed(x, keep))
    normed = model.last_block.norm1(tokens.rows_TC).detach().requires_grad_()
    scores = model.pool(model.last_block.mix(tokens, normed))[:, target]
    return torch.autograd.grad(scores.sum(), normed)[0] * normed.detach()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "explain",
    [
        lambda model, x, keep: CDAM(model).attribute(x, "all", keep),
        lambda model, x, keep: SmoothCDAM(model, 4).attribute(
            x, [0, 2], keep, generator=torch.Generator().manual_seed(5)
        ),
        lambda model, x, keep: IntegratedCDAM(model, 4).attribute(x, 1, keep),
        lambda model, x, keep: IntegratedCDAM(model, 4, "norm").attribute(x, 1, keep),
        lambda model, x, keep: IntegratedCDAM(model, 4, "value").attribute(x, 1, keep),
        lambda model, x, keep: AttentionMap(model).attribute(x, keep, heads="all"),
        lambda model, x, keep: AttentionRollout(model).attribute(x, 1, keep),
        lambda model, x, keep: RelevancePropagation(model).attribute(x, 1, keep),
    ],
    ids=[
        "CDAM",
        "Smooth",
        "Integrated",
        "Integrated, norm",
        "Integrated, value",
        "attention",
        "rollout",
        "propagation",
    ],
)
def test_a_model_with_adapters_has_the_map_of_its_merged_weights(explain, variant):
    (adapted, merged), (x, keep) = adapted_and_merged(**variant), sample()
    torch.testing.assert_close(adapted(x, keep), merged(x, keep))
    torch.testing.assert_close(explain(adapted, x, keep), explain(merged, x, keep))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", ["norm", "value"])
def test_the_integrated_maps_of_a_model_with_adapters_sum_to_the_difference(variant, path):
    (adapted, _), (x, keep) = adapted_and_merged(**variant), sample()
    _, gap = IntegratedCDAM(adapted, 60, path).attribute(x, 1, keep, return_convergence_gap=True)
    _, coarse = IntegratedCDAM(adapted, 2, path).attribute(x, 1, keep, return_convergence_gap=True)
    assert gap.abs().max() < 1e-3 * coarse.abs().max()


def test_a_hook_that_changes_the_block_changes_the_map():
    model, (x, keep) = random_vit(), sample()
    plain = CDAM(model).attribute(x, 1, keep)
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: 3 * output)
    # The norm after the block undoes the factor, except for its ε.
    torch.testing.assert_close(CDAM(model).attribute(x, 1, keep), plain, rtol=1e-3, atol=1e-3 * plain.abs().max())
    model.norm = nn.Identity()
    tripled = CDAM(model).attribute(x, 1, keep)
    model.blocks[-1]._forward_hooks.clear()
    torch.testing.assert_close(tripled, 3 * CDAM(model).attribute(x, 1, keep))


def test_a_hook_on_the_first_norm_is_part_of_what_is_explained():
    model, (x, keep) = random_vit(), sample()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.blocks[-1].norm1.weight.mul_(2)
        changed.blocks[-1].norm1.bias.mul_(2)
    model.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: 2 * output)
    for explanation in (CDAM, AttentionMap):
        maps = [
            explanation(m).attribute(x, keep=keep, **({"target": 1} if explanation is CDAM else {}))
            for m in (model, changed)
        ]
        torch.testing.assert_close(*maps)
    assert len(model.blocks[-1].norm1._forward_hooks) == 1


def test_a_parametrised_block_is_explained_by_the_weight_it_stands_for():
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, (x, keep) = random_vit(), sample()
    expected = copy.deepcopy(model)
    expected.blocks[-1].attn.qkv.weight.data.mul_(2)
    parametrize.register_parametrization(model.blocks[-1].attn.qkv, "weight", Doubled())
    torch.testing.assert_close(CDAM(model).attribute(x, 1, keep), CDAM(expected).attribute(x, 1, keep))


@pytest.mark.parametrize("way", ["hook", "pre-hook", "patched"])
def test_hooks_and_patches_on_the_models_own_forward_are_refused(way):
    model, (x, keep) = random_vit(), sample()
    if way == "patched":
        model.forward = types.MethodType(lambda self, x, keep=None: x, model)
    elif way == "hook":
        model.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        model.register_forward_pre_hook(lambda module, inputs: inputs)
    with pytest.raises(ValueError, match="its forward, which must therefore be unmodified"):
        CDAM(model).attribute(x, 1, keep)


def test_a_subclass_with_another_forward_is_refused_and_one_without_is_explained():
    class Same(VisionTransformer):
        pass

    class Other(VisionTransformer):
        def forward(self, x, keep=None):
            return -super().forward(x, keep)

    model, (x, keep) = random_vit(), sample()
    expected = CDAM(model).attribute(x, 1, keep)
    model.__class__ = Same
    torch.testing.assert_close(CDAM(model).attribute(x, 1, keep), expected)
    model.__class__ = Other
    with pytest.raises(ValueError, match="a Other, with hooks or another forward"):
        CDAM(model).attribute(x, 1, keep)


def test_attention_of_another_kind_and_hooked_blocks_are_refused_where_weights_are_read():
    model, (x, keep) = random_vit(), sample()
    handle = model.blocks[0].register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ValueError, match="remove the hooks, or use CDAM"):
        AttentionRollout(model).attribute(x, 1, keep)
    handle.remove()
    original = model.blocks[-1].attn.forward
    model.blocks[-1].attn.forward = lambda normed, tokens: 2 * original(normed, tokens)
    with pytest.raises(ValueError, match="replaced or patched"):
        AttentionMap(model).attribute(x, keep)
    expected = copy.deepcopy(model)
    del expected.blocks[-1].attn.forward
    for p in expected.blocks[-1].attn.proj.parameters():
        p.data.mul_(2)
    torch.testing.assert_close(CDAM(model).attribute(x, 1, keep), CDAM(expected).attribute(x, 1, keep))


def test_a_block_without_a_first_norm_is_refused():
    class Passing(nn.Module):
        def forward(self, rows, tokens):
            return rows

    model, (x, keep) = random_vit(), sample()
    model.blocks[-1] = Passing()
    with pytest.raises(ValueError, match="norm1, and this model's last block Passing has none"):
        CDAM(model).attribute(x, 1, keep)


def test_the_replaced_input_is_the_one_that_is_explained():
    (adapted, merged), (x, keep) = adapted_and_merged(), sample()
    tokens = adapted.before_last_block(adapted.embed(x, keep))
    normed = input_of_attention(adapted, tokens)
    torch.testing.assert_close(normed, merged.last_block.norm1(tokens.rows_TC))
    torch.testing.assert_close(output_from(adapted, tokens, 2 * normed), output_from(merged, tokens, 2 * normed))
