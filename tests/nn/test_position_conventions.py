"""Each layout's positions on another grid, compared with the output of the library that wrote them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskattn.nn.adapters.transformers import position_convention
from maskattn.nn.checkpoints import from_state_dict, load_vit
from maskattn.nn.positions import CONVENTIONS, resample_position_embedding

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

LEARNT = 6  # rows and columns of the learnt grid
SIZES = [(64, 64), (160, 160), (64, 144)]  # a smaller grid, a larger one, one that is not square
SIZE_OF_MODEL = {"image_size": 16 * LEARNT, "patch_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MLP = {"intermediate_size": 32}
# transformers' name of the model → arguments of its configuration, prefix tokens that have a position.
FAMILIES = {
    "ViT": (MLP, 1),
    "DeiT": (MLP, 2),
    "Beit": ({**MLP, "use_absolute_position_embeddings": True}, 1),
    "ViTMSN": (MLP, 1),
    "Dinov2": ({}, 1),
    "Dinov2WithRegisters": ({}, 1),
    "IJepa": (MLP, 0),
    "CLIPVision": (MLP, 1),
    "SiglipVision": (MLP, 0),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_transformers_resamples_each_family_under_the_convention_we_name(name, size):
    arguments, prefix = FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(hidden_size=16, **SIZE_OF_MODEL, **arguments)
    model = getattr(transformers, f"{name}Model")(config)
    embeddings = getattr(model, "vision_model", model).embeddings
    learnt = embeddings.position_embedding.weight if name.endswith("Vision") else embeddings.position_embeddings
    nn.init.normal_(learnt)
    target = (size[0] // 16, size[1] // 16)
    tokens = torch.zeros(1, prefix + target[0] * target[1], 16)
    expected = embeddings.interpolate_pos_encoding(tokens, *size)[:, prefix:]
    grid = learnt.reshape(1, -1, 16)[:, prefix:]
    ours = {kind: resample_position_embedding(grid, (LEARNT, LEARNT), target, kind) for kind in CONVENTIONS}
    named = ours.pop(position_convention(config.model_type))
    torch.testing.assert_close(named, expected)
    if target[0] < LEARNT:  # where the grid shrinks, every other convention is another result
        assert all((other - expected).abs().max() > 0.01 for other in ours.values())


@pytest.mark.parametrize("size", SIZES)
def test_a_file_of_timms_gives_timms_output_at_another_size(size):
    model = timm.models.VisionTransformer(
        img_size=96, embed_dim=48, depth=2, num_heads=3, num_classes=4, dynamic_img_size=True
    ).eval()
    nn.init.normal_(model.pos_embed)
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(from_state_dict(model.state_dict(), num_heads=3)(x), model(x))


@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters", "ViT"])
@pytest.mark.parametrize("size", SIZES)
def test_a_folder_of_transformers_gives_its_output_at_another_size(name, size, tmp_path):
    arguments, _ = FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(hidden_size=32, **SIZE_OF_MODEL, **arguments)
    model = getattr(transformers, f"{name}Model")(config).eval()
    nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, *size)
    asked = {"interpolate_pos_encoding": True} if name == "ViT" else {}
    torch.testing.assert_close(load_vit(tmp_path)(x), model(x, **asked).last_hidden_state[:, 0])
