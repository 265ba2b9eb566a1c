"""The packed ViT against timm's, against a dense ViT with a masked softmax, and against one without the background."""

from __future__ import annotations

import math

import pytest
import torch
from dense_vit import dense_masked_logits, logits_without_background
from torch import Tensor

from maskattn.nn import VisionTransformer
from maskattn.nn.positions import alibi_slopes, resample_position_embedding

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
VARIANTS = [
    {},
    {"reg_tokens": 2, "init_values": 0.1, "no_embed_class": True},
    {"reg_tokens": 3, "qkv_bias": False},
    {"global_pool": "avg"},
    {"global_pool": "avg", "reg_tokens": 4, "fc_norm": False},
    {"global_pool": "avg", "class_token": False},
    {"global_pool": "token", "fc_norm": True},
]


def random_vit(**arguments: object) -> VisionTransformer:
    """Weights of a size at which every layer matters to the output."""
    model = VisionTransformer(**{**SMALL, **arguments}).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def random_keep(B: int, H: int, W: int) -> Tensor:
    keep = torch.rand(B, H, W) > 0.5
    keep[0, 0, 0] = True
    return keep


def images(B: int = 3, H: int = 64, W: int = 64) -> Tensor:
    return torch.randn(B, 3, H, W, dtype=torch.float64)


def gradients(logits: Tensor, model: VisionTransformer) -> list[Tensor]:
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return list(torch.autograd.grad((logits * weights).sum(), list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_weights_load_and_give_timms_outputs(variant):
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(**SMALL, **variant).double()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = VisionTransformer(**SMALL, **variant).double()
    ours.load_state_dict(theirs.state_dict())
    x = images()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))


def assert_same_with_gradients(model: VisionTransformer, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(gradients(got, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_dense_vit_with_masked_softmax_forward_and_gradient(variant):
    model, x, keep = random_vit(**variant), images(), random_keep(3, 4, 4)
    packed, dense = model(x, keep), dense_masked_logits(model, x, keep)
    assert_same_with_gradients(model, packed, dense)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_plain_vit_without_the_background_tokens_forward_and_gradient(variant):
    model, x, keep = random_vit(**variant), images(), random_keep(3, 4, 4)
    packed, plain = model(x, keep), logits_without_background(model, x, keep)
    assert_same_with_gradients(model, packed, plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keeping_everything_is_the_plain_vit_forward_and_gradient(variant):
    model, x = random_vit(**variant), images()
    everything = torch.ones(3, 4, 4, dtype=torch.bool)
    packed, plain = model(x, everything), dense_masked_logits(model, x, everything)
    assert torch.equal(packed, model(x))
    assert_same_with_gradients(model, packed, plain)


def test_float32_agrees_to_float_rounding():
    model, x, keep = random_vit(), images(), random_keep(3, 4, 4)
    exact = model(x, keep)
    single = model.float()(x.float(), keep)
    assert (single - exact).abs().max() / exact.abs().max() < 64 * torch.finfo(torch.float32).eps


def test_reading_the_class_token_alone_equals_running_the_full_last_block():
    model, x, keep = random_vit(reg_tokens=2), images(), random_keep(3, 4, 4)
    tokens = model.before_last_block(model.embed(x, keep))
    torch.testing.assert_close(
        model.predict(tokens), model.pool(tokens.with_rows(model.last_block(tokens.rows_TC, tokens)))
    )


def test_background_pixels_of_nan_never_reach_output_or_gradients():
    model, x, keep = random_vit(), images(), random_keep(3, 4, 4)
    background = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(x)
    clean = model(x, keep)
    poisoned_x = x.masked_fill(background, float("nan")).requires_grad_()
    poisoned = model(poisoned_x, keep)
    assert torch.equal(poisoned, clean)
    grads = torch.autograd.grad(poisoned.sum(), [poisoned_x, *model.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][background] == 0).all()


def test_features_of_background_tokens_are_zero_and_prefix_tokens_are_there():
    model, x, keep = random_vit(reg_tokens=2), images(), random_keep(3, 4, 4)
    features = model.forward_features(x, keep)
    assert features.shape == (3, 3 + 16, 48)
    assert (features[:, 3:][~keep.flatten(1)] == 0).all()
    assert (features[:, :3] != 0).any(dim=-1).all()


@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}])
def test_an_image_without_tissue_gives_a_finite_constant(variant):
    model, keep = random_vit(**variant), torch.zeros(2, 4, 4, dtype=torch.bool)
    logits = model(images(2), keep)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], logits[1])
    assert all(g.isfinite().all() for g in gradients(logits, model))


def test_flat_and_grid_masks_mean_the_same():
    model, x, keep = random_vit(), images(), random_keep(3, 4, 4)
    assert torch.equal(model(x, keep), model(x, keep.flatten(1)))


def test_images_that_are_not_square_or_of_another_size_run():
    model, keep = random_vit(), random_keep(2, 3, 6)
    assert model(images(2, 48, 96), keep).shape == (2, 5)
    torch.testing.assert_close(
        model(images(2, 48, 96).fill_(0.5), keep), dense_masked_logits(model, images(2, 48, 96).fill_(0.5), keep)
    )


@pytest.mark.parametrize("target", [(4, 4), (7, 7), (3, 9), (14, 5)])
def test_timm_position_convention_is_timms(target):
    pytest.importorskip("timm")
    from timm.layers import resample_abs_pos_embed

    grid = torch.randn(1, 16, 8)
    ours = resample_position_embedding(grid, (4, 4), target, "timm")
    theirs = resample_abs_pos_embed(grid, target, num_prefix_tokens=0)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("target", [(7, 7), (3, 9), (14, 5)])
def test_dino_position_convention_samples_at_the_nudged_scale(target):
    grid = torch.randn(1, 16, 8, dtype=torch.float64).float()
    ours = resample_position_embedding(grid, (4, 4), target, "dino")
    expected = _bicubic_at_nudged_scale(grid.view(4, 4, 8), target)
    torch.testing.assert_close(ours[0], expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, resample_position_embedding(grid, (4, 4), target, "timm"), atol=1e-3)


def _bicubic_at_nudged_scale(grid_HWC: Tensor, target: tuple[int, int]) -> Tensor:
    """Cubic convolution (a = −0.75) with the source position (i + ½)/((n' + 0.1)/n) − ½, edges repeated."""

    def weights(size: int, length: int) -> Tensor:
        matrix = torch.zeros(length, size, dtype=torch.float64)
        for i in range(length):
            position = (i + 0.5) * size / (length + 0.1) - 0.5
            start = int(torch.tensor(position).floor()) - 1
            for j in range(start, start + 4):
                distance = abs(position - j)
                if distance <= 1:
                    w = 1.25 * distance**3 - 2.25 * distance**2 + 1
                else:
                    w = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
                matrix[i, min(max(j, 0), size - 1)] += w
        return matrix

    rows, columns = weights(grid_HWC.shape[0], target[0]), weights(grid_HWC.shape[1], target[1])
    return torch.einsum("ih,jw,hwc->ijc", rows, columns, grid_HWC.double()).float()


def test_dino_keys_are_ours():
    expected = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    }
    for i in range(3):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            expected |= {f"blocks.{i}.{part}.weight", f"blocks.{i}.{part}.bias"}
    assert set(VisionTransformer(**{**SMALL, "num_classes": 0}).state_dict()) == expected


def test_norms_use_epsilon_1e_6():
    norms = [m for m in VisionTransformer(**SMALL).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 7
    assert all(m.eps == 1e-6 for m in norms)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "max"}, "global_pool must be one of"),
        ({"global_pool": "token", "class_token": False}, "reads the class token"),
        ({"global_pool": "token_avg", "class_token": False}, "reads the class token"),
        ({"act_layer": "tanh"}, "act_layer must be one of"),
        ({"mlp_layer": "conv"}, "mlp_layer must be one of"),
        ({"mlp_layer": "swiglu_packed", "mlp_ratio": 2.03}, "got 97; choose mlp_ratio"),
        ({"pos_embed": "sine", "embed_dim": 30}, "multiple of 4"),
        ({"pos_embed": "rotary", "embed_dim": 54}, "multiple of 4"),
        ({"embed_dim": 50}, "num_heads must divide embed_dim"),
        ({"img_size": 15}, "img_size no smaller than patch_size"),
        ({"pos_embed": "fourier"}, "pos_embed must be one of"),
        ({"pos_embed_resample": "bilinear"}, "pos_embed_resample must be one of"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SMALL, **arguments})


def test_wrong_masks_and_images_are_named():
    model, x = random_vit(), images(2)
    with pytest.raises(ValueError, match=r"got keep.shape=\(2, 7\)"):
        model(x, torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match="compare it with its threshold"):
        model(x, torch.ones(2, 16))
    with pytest.raises(ValueError, match="no smaller than a patch of 16 px"):
        model(images(2, 15, 64))
    with pytest.raises(ValueError, match=r"got x.shape=\(3, 64, 64\)"):
        model(x[0].expand(3, 64, 64))


def test_training_is_deterministic():
    def step() -> list[Tensor]:
        torch.manual_seed(3)
        model = VisionTransformer(**SMALL)
        x, keep = torch.randn(8, 3, 64, 64), torch.rand(8, 4, 4) > 0.5
        return gradients(model(x, keep), model)

    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


MORE_VARIANTS = [
    {"qk_norm": True},
    {"scale_attn_norm": True, "scale_mlp_norm": True, "norm_eps": 1e-5},
    {"pre_norm": True, "act_layer": "quick_gelu"},
    {"mlp_layer": "swiglu", "act_layer": "silu", "reg_tokens": 2},
    {"mlp_layer": "swiglu_packed", "act_layer": "silu"},
    {"global_pool": "map", "class_token": False},
    {"global_pool": "coca", "pool_dim": 64, "reg_tokens": 2},
    {"global_pool": "token_avg"},
    {"pos_embed": "sine"},
    {"pos_embed": "rotary", "reg_tokens": 2},
    {"pos_embed": "rotary", "qk_norm": True},
    {"pos_embed": "alibi", "reg_tokens": 1},
    {"pos_embed": "alibi", "global_pool": "avg", "class_token": False},
    {"proj_bias": False, "final_norm": False},
]


@pytest.mark.parametrize("variant", MORE_VARIANTS)
def test_an_images_output_is_the_same_alone_and_in_a_batch_and_ignores_its_background(variant):
    model, x, keep = random_vit(**variant), images(), random_keep(3, 4, 4)
    background = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(x)
    together = model(x.masked_fill(background, float("nan")), keep)
    alone = torch.cat([model(x[b : b + 1], keep[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(together, alone)
    assert all(g.isfinite().all() for g in gradients(together, model))


@pytest.mark.parametrize("variant", MORE_VARIANTS)
def test_an_image_without_tissue_gives_a_finite_constant_in_every_variant(variant):
    model, keep = random_vit(**variant), torch.zeros(2, 4, 4, dtype=torch.bool)
    logits = model(images(2), keep)
    torch.testing.assert_close(logits[0], logits[1])
    assert all(g.isfinite().all() for g in gradients(logits, model))


def dense_bias_and_angles(model: VisionTransformer) -> tuple[Tensor, Tensor]:
    """ALiBi's N×N biases and DINOv3's angles of a 4 × 4 grid after the prefix, written out."""
    row, column = torch.arange(16) // 4, torch.arange(16) % 4
    coords = torch.stack([row, column], dim=1).double()
    P, heads = model.num_prefix_tokens, model.last_block.attn.num_heads
    slopes = torch.tensor([2 ** (-8 / 2), 2 ** (-8.0), 2 ** (-8 / 4)], dtype=torch.float64)  # of 2 heads, then of 4
    bias = torch.zeros(heads, P + 16, P + 16, dtype=torch.float64)
    bias[:, P:, P:] = -slopes[:, None, None] * torch.cdist(coords, coords)
    frequencies = 100 ** (-torch.arange(4, dtype=torch.float64) / 4)
    centres = 2 * math.pi * (2 * (coords + 0.5) / 4 - 1)
    angles = (centres[:, :, None] * frequencies).flatten(1)
    return bias, torch.cat([torch.zeros(P, 8, dtype=torch.float64), angles])


@pytest.mark.parametrize("position", ["alibi", "rotary"])
def test_attention_with_positions_is_the_dense_formula(position):
    model = random_vit(pos_embed=position, reg_tokens=2)
    tokens = model.embed(images(1), torch.ones(1, 4, 4, dtype=torch.bool))
    attn = model.blocks[0].attn
    q, k, v = attn.qkv(tokens.rows_TC).unflatten(1, (3, 3, 16)).permute(1, 2, 0, 3)
    bias, angles = dense_bias_and_angles(model)
    if position == "rotary":
        q, k = (
            torch.view_as_real(torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angles), angles))
            .transpose(-1, -2)
            .flatten(-2)
            for x in (q, k)
        )
    scores = q @ k.transpose(-1, -2) / 4 + (bias if position == "alibi" else 0)
    expected = attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    torch.testing.assert_close(attn(tokens.rows_TC, tokens).float(), expected.float())  # slopes and angles are float32


def test_sine_positions_are_absolute_and_rows_come_first():
    model = random_vit(pos_embed="sine").eval()
    x, keep = images(1), torch.zeros(1, 4, 4, dtype=torch.bool)
    keep[0, 2, 3] = True
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
    token = model.embed(x, keep).rows_TC[1]
    frequencies = 10000 ** (-torch.arange(12, dtype=torch.float64) / 12)
    expected = torch.cat(
        [(2 * frequencies).sin(), (2 * frequencies).cos(), (3 * frequencies).sin(), (3 * frequencies).cos()]
    )
    torch.testing.assert_close(token.float(), expected.float())


def test_alibi_slopes_of_counts_that_are_no_power_of_two():
    like = torch.zeros(())
    torch.testing.assert_close(alibi_slopes(8, like), 2.0 ** -torch.arange(1.0, 9.0))
    below, between = 2.0 ** -torch.arange(1.0, 9.0), 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5])
    torch.testing.assert_close(alibi_slopes(12, like), torch.cat([below, between]))


def test_a_bfloat16_model_keeps_its_positions_in_float32():
    model, x, keep = random_vit(pos_embed="alibi", num_heads=12), images(), random_keep(3, 4, 4)
    exact = model(x, keep)
    tokens = model.bfloat16().embed(x.bfloat16(), keep)
    assert tokens.coords_T2.dtype == torch.float32
    assert (model(x.bfloat16(), keep) - exact).abs().max() / exact.abs().max() < 32 * torch.finfo(torch.bfloat16).eps


def test_a_model_of_one_image_size_refuses_others():
    model = random_vit(dynamic_img_size=False)
    assert model(images(1)).shape == (1, 5)
    with pytest.raises(ValueError, match="dynamic_img_size=False"):
        model(images(1, 48, 96))
