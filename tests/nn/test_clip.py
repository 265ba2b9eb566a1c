"""CLIP of transformers: its image tower, converted and loaded, gives the library's own image embeddings."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from maskattn.nn import from_transformers, load_vit  # noqa: E402 (transformers may not be there)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 64, "patch_size": 16, "projection_dim": 24}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 12, "projection_dim": 24}


def random_clip(act: str = "quick_gelu"):
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config={**VISION, "hidden_act": act}, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_the_image_tower_of_a_whole_clip_gives_its_image_embeddings(act):
    model, x = random_clip(act), torch.randn(2, 3, 64, 64)
    ours = from_transformers(model)
    with torch.no_grad():
        theirs = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
        torch.testing.assert_close(ours(x), theirs, rtol=1e-4, atol=1e-4)
        hidden = model.vision_model(pixel_values=x).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.norm(hidden), model.vision_model.post_layernorm(hidden))
    assert ours.num_classes == 24
    assert not ours.training


def test_a_tower_without_projection_gives_its_class_token():
    torch.manual_seed(0)
    model, x = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).eval(), torch.randn(2, 3, 64, 64)
    ours = from_transformers(model)
    assert ours.num_classes == 0
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(pixel_values=x).pooler_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_loads_with_its_projection(whole, tmp_path):
    model, x = random_clip(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
    if whole:
        model.save_pretrained(tmp_path)
    else:
        tower = transformers.CLIPVisionModelWithProjection(model.config.vision_config).eval()
        tower.vision_model.load_state_dict(model.vision_model.state_dict())
        tower.visual_projection.load_state_dict(model.visual_projection.state_dict())
        tower.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in ("clip", "clip_vision_model")
    with torch.no_grad():
        torch.testing.assert_close(load_vit(tmp_path)(x), expected, rtol=1e-4, atol=1e-4)


def test_other_sizes_of_images_agree_with_transformers_interpolation():
    model, x = random_clip(), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        tower = model.vision_model(pixel_values=x, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(from_transformers(model)(x), model.visual_projection(tower), rtol=1e-3, atol=1e-3)


def test_what_has_no_image_tower_or_another_activation_is_refused():
    with pytest.raises(ValueError, match="activation 'relu'"):
        from_transformers(random_clip("relu"))
    with pytest.raises(ValueError, match="its class token, got"):
        from_transformers(random_clip(), global_pool="avg")
