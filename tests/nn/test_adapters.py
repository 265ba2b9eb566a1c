"""Converted models against the originals: all tokens, kept tokens alone, gradients, and explanations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("transformers")

from families import EVA, FAMILIES, TIMM, TRANSFORMERS, Family, Size, timm_eva, timm_vit

from maskattn.explain import CDAM, AttentionMap
from maskattn.explain.token_scores import score_tokens_by_autograd, score_tokens_in_closed_form
from maskattn.nn import VisionTransformer, from_timm, from_transformers

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def random_pair(family: Family, size: Size | None = None) -> tuple[nn.Module, VisionTransformer]:
    """The original and the converted model, with weights of a size at which every part matters."""
    theirs = family.original(size or Size()).double().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    return theirs, family.convert(theirs)


def sample(B: int = 2) -> tuple[Tensor, Tensor]:
    keep = torch.rand(B, 4, 4) > 0.5
    keep[:, 0, 0] = True
    return torch.randn(B, 3, 64, 64, dtype=torch.float64), keep


def pull_back(output: Tensor, x: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), x)[0]


def kept_outputs(family: Family, theirs: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    return torch.cat([family.kept_output(theirs, x[b : b + 1], keep[b].flatten()) for b in range(len(x))])


@families
def test_all_tokens_kept_gives_the_originals_output_and_gradient(family):
    theirs, ours = random_pair(family)
    x = sample()[0].requires_grad_()
    expected, got = family.output(theirs, x), ours(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(pull_back(got, x), pull_back(expected, x))


@families
def test_masked_is_the_original_run_on_the_kept_tokens_alone(family):
    theirs, ours = random_pair(family)
    x, keep = sample()
    x.requires_grad_()
    expected, got = kept_outputs(family, theirs, x, keep), ours(x, keep)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(pull_back(got, x), pull_back(expected, x))


@pytest.mark.parametrize("family", TIMM, ids=lambda family: family.name)
def test_every_parameter_of_a_timm_model_has_timms_gradient(family):
    theirs, ours = random_pair(family)
    x, keep = sample()
    expected, got = kept_outputs(family, theirs, x, keep), ours(x, keep)
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    of_ours = dict(ours.named_parameters())
    assert of_ours.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(of_ours[name].grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


@families
def test_float32_agrees_to_float_rounding(family):
    theirs, ours = random_pair(family)
    x, keep = sample()
    exact = kept_outputs(family, theirs, x, keep)
    single = ours.float()(x.float(), keep)
    original = kept_outputs(family, theirs.float(), x.float(), keep)
    assert (single - exact).abs().max() <= 4 * (original - exact).abs().max() + 1e-6 * exact.abs().max()


@families
def test_cdam_is_the_derivative_of_the_prediction(family):
    _, ours = random_pair(family)
    x, keep = sample()
    tokens = ours.before_last_block(ours.embed(x, keep))
    by_autograd, _ = score_tokens_by_autograd(ours, tokens, [0, 3])
    if ours.global_pool == "token":
        in_closed_form, _ = score_tokens_in_closed_form(ours, tokens, [0, 3])
        is_grid = tokens.packing.indices % tokens.packing.num_tokens >= tokens.num_prefix
        torch.testing.assert_close(in_closed_form[:, is_grid], by_autograd[:, is_grid])
    maps = CDAM(ours).attribute(x, [0, 3], keep)
    assert maps.shape == (2, 2, 4, 4)
    assert (maps.movedim(1, 3)[~keep] == 0).all()
    step = 1e-6
    normed = ours.last_block.norm1(tokens.rows_TC)
    row = int((tokens.packing.indices == tokens.num_prefix).nonzero()[0])  # the first grid token of the first image
    ends = []
    for sign in (1, -1):
        scaled = normed.clone()
        scaled[row] *= 1 + sign * step
        ends.append(ours.pool(ours.last_block.mix(tokens, scaled))[0, 3])
    torch.testing.assert_close(maps[0, 1, 0, 0], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)


@families
def test_attention_maps_leave_no_weight_on_background(family):
    _, ours = random_pair(family)
    x, keep = sample()
    if ours.cls_token is None:
        with pytest.raises(ValueError, match="class_token=False"):
            AttentionMap(ours)
        return
    maps = AttentionMap(ours).attribute(x, keep)
    assert (maps[~keep] == 0).all()
    assert (maps[keep] > 0).all()


@families
def test_background_pixels_are_never_read(family):
    _, ours = random_pair(family)
    x, keep = sample()
    background = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(x)
    assert torch.equal(ours(x.masked_fill(background, float("nan")), keep), ours(x, keep))


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if "dynamic" in str(f.original)] + EVA + TRANSFORMERS, ids=lambda f: f.name
)
@pytest.mark.parametrize("shape", [(96, 96), (48, 80)])
def test_other_image_sizes_resample_positions_as_the_original_does(family, shape):
    theirs, ours = random_pair(family)
    x = torch.randn(1, 3, *shape, dtype=torch.float64)
    if getattr(getattr(theirs, "config", None), "model_type", "") in ("vit", "ijepa"):
        expected = theirs(x, interpolate_pos_encoding=True)
        expected = expected.logits if hasattr(expected, "logits") else expected.last_hidden_state
        if expected.ndim == 3:
            expected = expected.mean(dim=1) if ours.cls_token is None else expected[:, 0]
    else:
        expected = family.output(theirs, x)
    torch.testing.assert_close(ours(x).float(), expected.float())  # positions are resampled in float32


def test_training_drops_the_same_paths_as_timm():
    theirs = timm_vit(Size(), drop_path_rate=0.6, init_values=0.5).double().train()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours, x = from_timm(theirs), sample(8)[0]
    assert ours.training
    torch.manual_seed(5)
    expected = theirs(x)
    torch.manual_seed(5)
    got = ours(x)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, ours.eval()(x))


def test_mode_frozen_parameters_and_dtype_are_taken_over_and_weights_are_copied():
    theirs = timm_vit(Size()).bfloat16().eval()
    theirs.cls_token.requires_grad_(False)
    ours = from_timm(theirs)
    assert not ours.training
    frozen = from_timm(timm_eva(Size(), qkv_bias=True).requires_grad_(False))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert ours.cls_token.dtype == torch.bfloat16
    assert not ours.cls_token.requires_grad
    assert ours.pos_embed.requires_grad
    with torch.no_grad():
        ours.head.weight.zero_()
    assert (theirs.head.weight != 0).any()


def test_a_model_that_returns_all_tokens_returns_them_at_their_positions():
    theirs = timm_vit(Size(), global_pool="", num_classes=0, reg_tokens=2).double().eval()
    ours, (x, keep) = from_timm(theirs), sample()
    torch.testing.assert_close(ours(x), theirs(x))
    features = ours(x, keep)
    assert features.shape == (2, 3 + 16, 48)
    assert (features[:, 3:][~keep.flatten(1)] == 0).all()
    with pytest.raises(ValueError, match="another global_pool"):
        CDAM(ours).attribute(x, 0, keep)


@pytest.mark.parametrize("name", ["ViT", "DINOv2 with registers", "DINOv3-ViT"])
def test_encoders_of_transformers_can_be_pooled_in_other_ways(name):
    family = next(family for family in TRANSFORMERS if family.name == f"transformers {name}")
    theirs, _ = random_pair(family)
    x = sample()[0]
    tokens, prefix = theirs(x).last_hidden_state, 1 + getattr(theirs.config, "num_register_tokens", 0)
    mean = tokens[:, prefix:].mean(dim=1)
    torch.testing.assert_close(from_transformers(theirs, global_pool="avg")(x), mean)
    torch.testing.assert_close(
        from_transformers(theirs, global_pool="token_avg")(x), torch.cat([tokens[:, 0], mean], dim=1)
    )
    torch.testing.assert_close(from_transformers(theirs, global_pool="")(x), tokens)
    torch.testing.assert_close(from_transformers(theirs).forward_features(x), tokens)


def test_a_classifier_of_transformers_keeps_its_pool():
    family = next(family for family in TRANSFORMERS if family.name == "transformers ViT, classifier")
    with pytest.raises(ValueError, match="it has a classifier"):
        from_transformers(family.original(Size()), global_pool="avg")


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("vit_small_patch16_rope_mixed_224", {}, "only DINOv3's and EVA-02's rotary positions are supported"),
        ("vit_small_patch16_dinov3", {"global_pool": "map"}, "global_pool='map'"),
        ("vit_small_patch16_dinov3", {"rope_grid_offset": 1.0}, "another grid"),
        ("vit_small_patch16_dinov3", {"rope_rescale_coords": 2.0}, "moved at random"),
        ("vit_small_patch16_dinov3", {"use_post_norm": True}, "blocks or attention of another kind"),
        ("vit_small_patch16_dinov3", {"use_pre_transformer_norm": True}, "norm before the blocks"),
        ("vit_small_patch16_dinov3", {"patch_size": (16, 8)}, "not square"),
        ("deit_tiny_distilled_patch16_224", {}, "distillation tokens"),
        ("beit_base_patch16_224", {"depth": 1}, "only timm.models.VisionTransformer"),
        ("vit_tiny_patch16_224", {"global_pool": "max"}, "global_pool='max'"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("vit_tiny_patch16_224", {"dynamic_img_pad": True}, "dynamic_img_pad"),
        ("vit_tiny_patch16_224", {"patch_size": (16, 8)}, "not square"),
        ("vit_tiny_patch16_224", {"act_layer": "mish"}, "activation Mish"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "norm layer RmsNorm"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "attention DiffAttention"),
        ("vit_tiny_patch16_224", {"pool_include_prefix": True}, "pool_include_prefix"),
        ("resnet18", {}, "only timm.models.VisionTransformer"),
    ],
)
def test_timm_parts_that_ours_lacks_are_refused_and_named(name, arguments, part):
    import timm

    with pytest.raises(ValueError, match=part):
        from_timm(timm.create_model(name, **arguments))


def test_other_blocks_and_pools_of_trained_heads_are_refused():
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(ValueError, match="block ParallelScalingBlock"):
        from_timm(timm_vit(Size(), block_fn=ParallelScalingBlock))
    with pytest.raises(ValueError, match="it has a head"):
        from_timm(timm_vit(Size()), global_pool="avg")
    with pytest.raises(ValueError, match=r"it has no attn_pool\.latent"):
        from_timm(timm_vit(Size(), num_classes=0), global_pool="map")
    with pytest.raises(TypeError, match="to load one by name use"):
        from_timm("vit_tiny_patch16_224")


def test_transformers_parts_that_ours_lacks_are_refused_and_named():
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    with pytest.raises(ValueError, match="model type 'beit' is none of"):
        from_transformers(transformers.BeitModel(transformers.BeitConfig(**small)))
    with pytest.raises(ValueError, match="activation 'gelu_10'"):
        from_transformers(transformers.ViTModel(transformers.ViTConfig(**small, hidden_act="gelu_10")))
    with pytest.raises(ValueError, match="only the encoder"):
        from_transformers(transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**small)))
    small.pop("intermediate_size")
    with pytest.raises(ValueError, match="a Backbone returns feature maps"):
        from_transformers(transformers.Dinov2Backbone(transformers.Dinov2Config(**small)))
    dropout = transformers.ViTConfig(**small, intermediate_size=64, hidden_dropout_prob=0.1)
    with pytest.raises(ValueError, match=r"hidden_dropout_prob=0\.1 in training"):
        from_transformers(transformers.ViTModel(dropout).train())
    with pytest.raises(TypeError, match="to load one by name use"):
        from_transformers("owkin/phikon")


TRANSFORMERS_4 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
FIRST_NAMES = {
    "ViT": {"layers.": "encoder.layer.", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", **TRANSFORMERS_4},
    "DINOv2, SwiGLU": TRANSFORMERS_4,
}


@pytest.mark.parametrize("name", FIRST_NAMES)
def test_the_names_of_transformers_4_are_known(name, monkeypatch):
    family = next(family for family in TRANSFORMERS if family.name == f"transformers {name}")
    theirs, ours = random_pair(family)
    state = {}
    for key, x in theirs.state_dict().items():
        for new, old in FIRST_NAMES[name].items():
            key = key.replace(new, old)
        state[key] = x
    for key in [key for key in state if "mlp.gate_proj" in key]:
        up = state.pop(key.replace("gate_proj", "up_proj"))
        state[key.replace("gate_proj", "weights_in")] = torch.cat([state.pop(key), up])
    state = {key.replace("down_proj", "weights_out"): x for key, x in state.items()}
    monkeypatch.setattr(theirs, "state_dict", lambda: state)
    x, keep = sample()
    torch.testing.assert_close(from_transformers(theirs)(x, keep), ours(x, keep))
