"""timm's interface on converted models: the same values as timm's, and masks in addition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

import timm
from families import Size, timm_vit

from maskattn.explain import CDAM, AttentionMap
from maskattn.explain.metrics import removal_curves
from maskattn.nn import VisionTransformer, from_timm

VARIANTS = [
    {},
    {"reg_tokens": 2},
    {"global_pool": "avg"},
    {"global_pool": "map", "class_token": False},
    {"class_token": False, "global_pool": "avg", "fc_norm": False},
    {"global_pool": "", "num_classes": 0},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def pair(**variant: object) -> tuple[nn.Module, VisionTransformer]:
    theirs = timm_vit(Size(), **variant).double().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    return theirs, from_timm(theirs)


def images(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


@variants
@pytest.mark.parametrize("pre_logits", [False, True])
def test_the_head_alone_gives_timms_output(variant, pre_logits):
    (theirs, ours), x = pair(**variant), images()
    expected = theirs.forward_head(theirs.forward_features(x), pre_logits=pre_logits)
    torch.testing.assert_close(ours.forward_head(ours.forward_features(x), pre_logits=pre_logits), expected)


@variants
def test_the_head_alone_takes_the_mask_that_the_features_were_made_with(variant):
    (_, ours), x = pair(**variant), images()
    keep = torch.rand(2, 4, 4) > 0.5
    torch.testing.assert_close(ours.forward_head(ours.forward_features(x, keep), keep=keep), ours(x, keep))


@variants
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2, "norm": True, "output_fmt": "NLC"},
        {"indices": [0, -1], "return_prefix_tokens": True},
        {"indices": [1], "stop_early": True, "intermediates_only": True},
        {"indices": 1, "output_dict": True, "return_prefix_tokens": True},
    ],
    ids=str,
)
def test_inner_features_are_timms(variant, options):
    (theirs, ours), x = pair(**variant), images()
    torch.testing.assert_close(ours.forward_intermediates(x, **options), theirs.forward_intermediates(x, **options))


@variants
@pytest.mark.parametrize("reshape", [False, True])
def test_dinos_name_for_inner_features_gives_timms(variant, reshape):
    (theirs, ours), x = pair(**variant), images()
    expected, got = (m.get_intermediate_layers(x, 2, reshape=reshape, norm=True) for m in (theirs, ours))
    torch.testing.assert_close(got, list(expected))


def test_inner_features_of_a_masked_image_are_those_of_its_kept_tokens_and_0_elsewhere():
    (_, ours), x = pair(reg_tokens=2), images()
    keep = torch.rand(2, 4, 4) > 0.5
    final, inner = ours.forward_intermediates(x, norm=True, keep=keep)
    torch.testing.assert_close(final, ours.forward_features(x, keep))
    torch.testing.assert_close(inner[-1].flatten(2).mT, final[:, 3:])
    assert not inner[0].movedim(1, -1)[~keep].any()
    poisoned = x.masked_fill(~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None], float("nan"))
    torch.testing.assert_close(
        ours.forward_intermediates(poisoned, keep=keep)[1], ours.forward_intermediates(x, keep=keep)[1]
    )


def test_a_new_head_has_the_size_the_pool_asks_for_and_the_models_dtype():
    _, ours = pair()
    x = images()
    features = ours.forward_head(ours.forward_features(x), pre_logits=True)
    ours.reset_classifier(0)
    torch.testing.assert_close(ours(x), features)
    for pool, width in (("token", 48), ("avg", 48), ("token_avg", 96)):
        ours.reset_classifier(7, pool)
        assert ours.get_classifier().weight.shape == (7, width) == (ours.num_classes, ours.head_hidden_size)
        assert ours(x).shape == (2, 7)
        assert ours(x).dtype == torch.float64
    assert ours.num_features == 48


@pytest.mark.parametrize(
    ("arguments", "pool", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "token", "this model has none; use 'avg'"),
        ({}, "map", "needs an attention pool"),
        ({}, "max", "global_pool must be"),
        ({"global_pool": "avg"}, "token_avg", "48 channels"),
    ],
)
def test_a_pool_that_the_model_cannot_have_is_refused(arguments, pool, message):
    _, ours = pair(**arguments)
    with pytest.raises(ValueError, match=message):
        ours.reset_classifier(3, pool)


@pytest.mark.parametrize("indices", [[3], [-4], 4, 0, []])
def test_blocks_that_are_not_there_are_named(indices):
    _, ours = pair()
    with pytest.raises(ValueError, match="must name some of the 3 blocks"):
        ours.forward_intermediates(images(), indices)


def test_the_card_of_the_model_comes_along():
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1)
    ours = from_timm(theirs)
    assert ours.default_cfg["mean"] == ours.pretrained_cfg["mean"] == theirs.default_cfg["mean"]
    assert VisionTransformer(depth=1).default_cfg == {}


@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}, {"global_pool": "map", "class_token": False}], ids=str)
def test_sides_that_are_not_a_multiple_of_the_token_are_cropped_as_in_timm(variant):
    theirs = timm_vit(Size(img_size=70), **variant).double().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours, x = from_timm(theirs), images(70, 70)
    assert ours.grid_HW == (4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), ours(x[:, :, :64, :64]))
    torch.testing.assert_close(pull_back(ours, x), pull_back(theirs, x))


def pull_back(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]


def test_siglips_so400m_at_384_px_has_27_tokens_a_side():
    theirs = timm.create_model("vit_so400m_patch14_siglip_384", depth=1, embed_dim=48, num_heads=3).eval()
    ours, x = from_timm(theirs), torch.randn(1, 3, 384, 384)
    assert ours.grid_HW == (27, 27)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x, torch.rand(1, 27, 27) > 0.5).shape == theirs(x).shape


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_evas_without_rotary_positions_convert(pool):
    size = {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 4, "global_pool": pool}
    theirs = timm.create_model("eva_giant_patch14_224", **size).double().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours, x = from_timm(theirs), images(56, 56)
    torch.testing.assert_close(ours(x), theirs(x))
    keep = torch.rand(2, 4, 4) > 0.5
    prefix = torch.ones(1, dtype=torch.bool)
    for b in range(2):
        tokens = theirs._pos_embed(theirs.patch_embed(x[b : b + 1]))[0][:, torch.cat([prefix, keep[b].flatten()])]
        for block in theirs.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(ours(x, keep)[b : b + 1], theirs.forward_head(theirs.norm(tokens)))


def test_explanations_and_metrics_take_such_images():
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=2).eval()
    x = torch.randn(2, 3, 70, 75)
    maps = CDAM(model).attribute(x, 0)
    torch.testing.assert_close(maps, CDAM(model).attribute(x[:, :, :64, :64], 0))
    assert AttentionMap(model).attribute(x).shape == (2, 4, 4)
    for perturbation in ("drop", "blur", "mean"):
        assert removal_curves(model, x, maps, 0, perturbation=perturbation).correctness.isfinite().all()
