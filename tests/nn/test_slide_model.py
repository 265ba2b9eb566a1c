from __future__ import annotations

import json

import pytest
import torch

from maskattn.nn import SlideModel, SlideModelConfig

CONFIG = SlideModelConfig(
    name="small",
    classes=("benign", "low", "high"),
    tile_px=64,
    spacing_um=1.0,
    tile_encoder={"embed_dim": 32, "depth": 2, "num_heads": 2},
    slide_encoder={"img_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
)


def small_model() -> SlideModel:
    model = SlideModel(CONFIG).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def tiles(B: int) -> torch.Tensor:
    return torch.randint(0, 256, (B, 3, 64, 64), dtype=torch.uint8)


def test_slide_logits_come_from_tissue_tiles_and_tissue_tokens_alone():
    model, pixels, keep = small_model(), tiles(6), torch.rand(6, 4, 4) > 0.4
    keep_HW = torch.tensor([[True, True, False, True], [False, True, True, True]])
    logits = model(model.encode_tiles(pixels, keep), keep_HW)
    glass = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(pixels)
    assert logits.shape == (3,)
    assert torch.equal(logits, model(model.encode_tiles(pixels.masked_fill(glass, 7), keep), keep_HW))


def test_pixels_are_scaled_and_normalised_per_channel():
    config = SlideModelConfig(**{**vars(CONFIG), "pixel_mean": (0.1, 0.2, 0.3), "pixel_std": (0.5, 1.0, 2.0)})
    model, pixels = SlideModel(config), tiles(2)
    x = (pixels / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(model.encode_tiles(pixels), model.tile_encoder(x))


def test_positions_of_tiles_matter():
    model, embeddings = small_model(), torch.randn(3, 32)
    first, second = torch.zeros(2, 4, 5, dtype=torch.bool)
    first[0, :3], second[3, 2:] = True, True
    assert not torch.allclose(model(embeddings, first), model(embeddings, second))


def test_save_and_load_give_the_same_model_in_one_safetensors_file_and_its_configuration(tmp_path):
    model = small_model()
    model.save(tmp_path / "model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    loaded = SlideModel.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert loaded.identity() == model.identity()
    assert not loaded.training
    pixels = tiles(2)
    assert torch.equal(loaded.encode_tiles(pixels), model.encode_tiles(pixels))


def test_identity_tells_weights_and_configurations_apart():
    model = small_model()
    before = model.identity()
    with torch.no_grad():
        model.slide_encoder.head.bias[0] += 1
    assert model.identity() != before
    assert SlideModel(SlideModelConfig(**{**vars(CONFIG), "name": "other"})).identity() != SlideModel(CONFIG).identity()


def test_half_precision_storage_loads_in_float32(tmp_path):
    small_model().save(tmp_path / "half.safetensors", dtype=torch.float16)
    model = SlideModel.load(tmp_path / "half.safetensors")
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_missing_and_unexpected_keys_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    small_model().save(path)
    state = load_file(path)
    state["blocks.9.extra"] = state.pop("tile_encoder.norm.weight")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"has no tile_encoder.norm.weight; blocks.9.extra has no place"):
        SlideModel.load(path)


def test_wrong_shapes_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    small_model().save(path)
    config = json.loads(path.with_suffix(".json").read_text())
    config["classes"] = ["benign", "malignant"]
    path.with_suffix(".json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"slide_encoder.head.weight is \(3, 32\) instead of \(2, 32\)"):
        SlideModel.load(path)


def test_unknown_and_missing_configuration_keys_are_named():
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\] and no \['classes', 'name'"):
        SlideModelConfig.from_json('{"colour": 1, "tile_px": 64}')
    with pytest.raises(ValueError, match="must be JSON"):
        SlideModelConfig.from_json("{")


def test_files_that_are_not_there_or_not_safetensors_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        SlideModel.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"end in \.safetensors"):
        SlideModel.load(tmp_path / "model.pt")
    path = tmp_path / "bad.safetensors"
    small_model().save(path)
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        SlideModel.load(path)


def test_a_failed_save_leaves_no_half_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    model, path = small_model(), tmp_path / "model.safetensors"
    model.save(path)
    old = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_wrong_inputs_are_named():
    model = small_model()
    with pytest.raises(TypeError, match="uint8 RGB"):
        model.encode_tiles(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="2 embeddings and 3 kept cells"):
        model(torch.randn(2, 32), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must give features"):
        SlideModel(SlideModelConfig(**{**vars(CONFIG), "tile_encoder": {"num_classes": 2}}))
    with pytest.raises(ValueError, match="multiple of the tile encoder's patch_size"):
        SlideModel(SlideModelConfig(**{**vars(CONFIG), "tile_px": 60}))
