"""SigLIP of transformers: its image tower, converted and loaded, gives the library's own embeddings, and maps."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from maskattn.explain import METHODS  # noqa: E402 (transformers may not be there)
from maskattn.nn import from_transformers, load_vit  # noqa: E402 (transformers may not be there)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 64, "patch_size": 16}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 12, "projection_size": 32}


def with_random_weights(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def random_tower(**options):
    return with_random_weights(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**VISION, **options})))


def random_siglip():
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return with_random_weights(transformers.SiglipModel(config))


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu", "quick_gelu"])
def test_a_tower_gives_what_its_attention_pooling_reads(act):
    model, x = random_tower(hidden_act=act), torch.randn(2, 3, 64, 64)
    ours = from_transformers(model)
    with torch.no_grad():
        theirs = model(pixel_values=x)
        torch.testing.assert_close(ours(x), theirs.pooler_output, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.forward_features(x), theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert ours.global_pool == "map"


def test_the_image_tower_of_a_whole_siglip_gives_its_image_embeddings_and_its_folder_loads(tmp_path):
    model, x = random_siglip(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=x).pooler_output
        torch.testing.assert_close(from_transformers(model)(x), expected, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "whole")
        torch.testing.assert_close(load_vit(tmp_path / "whole")(x), expected, rtol=1e-4, atol=1e-4)
        tower = transformers.SiglipVisionModel.from_pretrained(tmp_path / "whole")
        tower.save_pretrained(tmp_path / "tower")
        torch.testing.assert_close(load_vit(tmp_path / "tower")(x), expected, rtol=1e-4, atol=1e-4)


def test_its_classifier_reads_the_mean_of_all_tokens(tmp_path):
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION, num_labels=3)
    model = with_random_weights(transformers.SiglipForImageClassification(config))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(from_transformers(model)(x), model(pixel_values=x).logits, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(load_vit(tmp_path)(x), model(pixel_values=x).logits, rtol=1e-4, atol=1e-4)


def test_other_sizes_of_images_agree_with_transformers_interpolation():
    model, x = random_tower(), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        theirs = model(pixel_values=x, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(from_transformers(model)(x), theirs, rtol=1e-3, atol=1e-3)


def test_masked_patches_are_as_if_absent():
    ours, x = from_transformers(random_tower()), torch.randn(1, 3, 64, 64)
    keep = torch.rand(1, 4, 4) > 0.4
    keep[0, 0, 0] = True
    spoilt = x.clone()
    spoilt[(~keep).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(x)] = torch.nan
    with torch.no_grad():
        assert torch.equal(ours(x, keep), ours(spoilt, keep))
    maps = METHODS["integrated-norm"](ours).attribute(x, lambda z: z[:, 0], keep)
    assert maps.isfinite().all()
    assert (maps[~keep] == 0).all()


def test_parts_that_ours_lacks_are_named():
    with pytest.raises(ValueError, match="activation 'relu'"):
        from_transformers(random_tower(hidden_act="relu"))
    with pytest.raises(ValueError, match=r"vision_use_head=False.*pass global_pool='avg'"):
        from_transformers(random_tower(vision_use_head=False))
    with pytest.raises(ValueError, match="its pooling is global_pool='map', got 'avg'"):
        from_transformers(random_tower(), global_pool="avg")
    text = transformers.SiglipTextModel(transformers.SiglipTextConfig(**TEXT))
    text.config.model_type = "siglip"
    with pytest.raises(ValueError, match="no image tower"):
        from_transformers(text)


def test_a_tower_without_its_pooling_is_read_as_asked():
    model, x = random_tower(vision_use_head=False), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        mean = model(pixel_values=x).last_hidden_state.mean(dim=1)
        torch.testing.assert_close(from_transformers(model, global_pool="avg")(x), mean, rtol=1e-4, atol=1e-4)
