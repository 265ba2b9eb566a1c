"""Weights by name and from files: every layout gives the outputs of the model that it was saved from."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maskattn.nn import VisionTransformer, from_state_dict, load_vit

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 12, "num_heads": 3}


def random_vit(**arguments: object) -> VisionTransformer:
    model = VisionTransformer(**{**SMALL, "depth": 2, **arguments}).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def assert_same(ours: VisionTransformer, expected: VisionTransformer, channels: int = 3, side: int = 64) -> None:
    x = torch.randn(2, channels, side, side, dtype=torch.float64)
    keep = torch.rand(2, side // 16, side // 16) > 0.4 if channels == 3 else None
    assert torch.equal(ours(x, keep), expected(x, keep))


VARIANTS = [
    {},
    {"depth": 12, "num_classes": 4},
    {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
    {"mlp_layer": "swiglu_packed", "act_layer": "silu", "mlp_ratio": 16 / 3, "reg_tokens": 8},
    {"mlp_layer": "swiglu", "act_layer": "silu", "mlp_ratio": 8 / 3},
    {"global_pool": "avg", "class_token": False},
    {"global_pool": "map", "class_token": False},
    {"global_pool": "coca", "pool_dim": 32},
    {"qk_norm": True, "qkv_bias": False, "proj_bias": False},
    {"pre_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    {"pos_embed": "none", "final_norm": False},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_says_everything_but_the_number_of_heads(variant, suffix, tmp_path):
    expected, path = random_vit(**variant), tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(expected.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(expected.state_dict(), path)
    heads = None if variant.get("qk_norm") else 3
    size = {"img_size": 64} if variant.get("pos_embed") == "none" else {}
    assert_same(load_vit(path, num_heads=heads, **size), expected)


def test_dinos_training_checkpoint_gives_the_teachers_backbone(tmp_path):
    teacher, student = random_vit(), random_vit()
    head = {"head.mlp.0.weight": torch.zeros(3, 48), "head.last_layer.weight_v": torch.zeros(3, 3)}
    checkpoint = {
        "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()} | head,
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 3,
    }
    torch.save(checkpoint, tmp_path / "dino.pth")
    assert_same(load_vit(tmp_path / "dino.pth", num_heads=3), teacher)
    assert_same(from_state_dict(checkpoint["student"], num_heads=3), student)
    released = teacher.state_dict() | head
    assert_same(from_state_dict({"model": released}, num_heads=3), teacher)


def test_dinov2s_own_layout_inserts_registers_after_the_positions_are_added():
    expected = random_vit(
        reg_tokens=4, no_embed_class=True, init_values=0.1, mlp_layer="swiglu_packed", act_layer="silu"
    )
    state = dict(expected.state_dict())
    position = torch.randn(1, 1, 48, dtype=torch.float64)
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - position
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 48)
    for key in [key for key in state if key.startswith("blocks.")]:
        chunked = key.replace("blocks.", "blocks.0.").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[chunked] = state.pop(key)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(from_state_dict(state, num_heads=3)(x), expected(x))


def shifted_by_a_tenth(grid_1NC: Tensor, side: int) -> Tensor:
    """Positions as DINO and DINOv2 read them on a grid of another size: at scales of (side + 0.1) / learnt."""
    learnt = math.isqrt(grid_1NC.shape[1])
    image = grid_1NC.transpose(1, 2).unflatten(2, (learnt, learnt))
    scale = (side + 0.1) / learnt
    return nn.functional.interpolate(image, scale_factor=(scale, scale), mode="bicubic").flatten(2).transpose(1, 2)


def smoothed(grid_1NC: Tensor, side: int) -> Tensor:
    """As timm does, and DINOv2 for its models with registers."""
    learnt = math.isqrt(grid_1NC.shape[1])
    image = grid_1NC.transpose(1, 2).unflatten(2, (learnt, learnt))
    size = (side, side)
    return nn.functional.interpolate(image, size=size, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


def in_dinov2s_names(state: dict[str, Tensor], registers: bool) -> dict[str, Tensor]:
    state = {**state, "mask_token": torch.zeros(1, 48)}
    if registers:
        state["register_tokens"] = torch.zeros(1, 4, 48)
    return state


@pytest.mark.parametrize(
    ("layout", "positions"),
    [
        (lambda state: state, smoothed),
        (lambda state: {"state_dict": {f"module.{key}": x for key, x in state.items()}}, smoothed),
        (lambda state: {"teacher": {f"backbone.{key}": x for key, x in state.items()}}, shifted_by_a_tenth),
        (lambda state: {"student": {f"module.backbone.{key}": x for key, x in state.items()}}, shifted_by_a_tenth),
        (lambda state: {**state, "head.last_layer.weight_v": torch.zeros(2, 2)}, shifted_by_a_tenth),
        (lambda state: {**state, "masked_embed": torch.zeros(1, 48)}, shifted_by_a_tenth),
        (lambda state: in_dinov2s_names(state, registers=False), shifted_by_a_tenth),
        (lambda state: {"teacher": in_dinov2s_names(state, registers=True)}, smoothed),
    ],
    ids=["timm", "timm in training", "DINO", "DINO's student", "DINO's head", "iBOT", "DINOv2", "DINOv2 registers"],
)
@pytest.mark.parametrize("side", [5, 7])
def test_positions_are_resampled_as_the_layouts_own_library_does(layout, positions, side):
    state = dict(random_vit().state_dict())
    x = torch.randn(1, 3, 16 * side, 16 * side, dtype=torch.float64)
    learnt = state["pos_embed"]
    resampled = torch.cat([learnt[:, :1], positions(learnt[:, 1:], side)], dim=1)
    expected = from_state_dict(layout({**state, "pos_embed": resampled}), num_heads=3)  # this grid is its own
    torch.testing.assert_close(from_state_dict(layout(state), num_heads=3)(x), expected(x), atol=1e-6, rtol=1e-5)


def test_a_convention_that_is_named_outranks_the_layouts():
    state = in_dinov2s_names(random_vit().state_dict(), registers=False)
    assert from_state_dict(state, num_heads=3).pos_embed_resample == "dino"
    assert from_state_dict(state, num_heads=3, pos_embed_resample="transformers").pos_embed_resample == "transformers"


def test_a_region_vit_with_phi_is_an_encoder_of_embeddings():
    expected = random_vit(img_size=4, patch_size=1, in_chans=20, embed_act="gelu")
    state = dict(expected.state_dict())
    state["phi.0.weight"] = state.pop("patch_embed.proj.weight").flatten(1)
    state["phi.0.bias"] = state.pop("patch_embed.proj.bias")
    assert_same(
        from_state_dict({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, num_heads=3), expected, 20, 4
    )


def test_missing_and_unexpected_tensors_of_a_file_are_named():
    state = random_vit().state_dict()
    with pytest.raises(ValueError, match="pass num_heads"):
        from_state_dict(state)
    with pytest.raises(ValueError, match=r"blocks\.0\.extra has no place"):
        from_state_dict({**state, "blocks.0.extra": torch.zeros(1)}, num_heads=3)
    with pytest.raises(ValueError, match="an encoder must have one key that ends in"):
        from_state_dict({"weight": torch.zeros(1)}, num_heads=3)
    with pytest.raises(ValueError, match="its keys are transformers'"):
        from_state_dict({"vit.embeddings.cls_token": torch.zeros(1)}, num_heads=3)
    positions = {**state, "pos_embed": torch.zeros(1, 1 + 4 * 3, 48)}
    with pytest.raises(ValueError, match="pass img_size"):
        from_state_dict(positions, num_heads=3)
    assert from_state_dict(positions, num_heads=3, img_size=(64, 48)).grid_HW == (4, 3)


def test_files_that_are_not_there_or_of_another_kind_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="name must begin with timm:"):
        load_vit("vit_small_patch16_224")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights must end in \.safetensors"):
        load_vit(tmp_path / "weights.npz")
    with pytest.raises(FileNotFoundError, match=r"a config\.json or open_clip_config\.json, got neither"):
        load_vit(tmp_path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Code:
        def __reduce__(self) -> tuple:
            return print, ("run",)

    torch.save({"model": Code()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"got the code print pickled in .*bad\.pt, .* save model\.state_dict\(\)"):
        load_vit(tmp_path / "bad.pt", num_heads=3)
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"got the code torch\.nn\.modules\.linear\.Linear pickled in .*whole\.pt"):
        load_vit(tmp_path / "whole.pt", num_heads=3)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:3000], lambda whole: b"x" * 5000])
def test_damaged_weights_are_named(suffix, damage, tmp_path):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    save = torch.save if suffix == ".pt" else save_file
    save(random_vit().state_dict(), whole)
    path.write_bytes(damage(whole.read_bytes()))
    with pytest.raises(
        ValueError, match=r"must be a complete file .*, got .*damaged\..*: \w+Error: \S.*; copy it again"
    ):
        load_vit(path, num_heads=3)


def test_weights_that_are_no_tensors_by_name_are_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"tensors by name, got a list in .*list\.pt"):
        load_vit(tmp_path / "list.pt", num_heads=3)


def test_timms_models_load_by_name():
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    ours = load_vit("timm:vit_tiny_patch16_224", pretrained=False, depth=1)
    torch.manual_seed(1)
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs(x))


SMALL_HF = {"image_size": 64, "patch_size": 16, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
SMALL_HF["intermediate_size"] = 96


def test_a_folder_of_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ViTModel(transformers.ViTConfig(**SMALL_HF), add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_vit(tmp_path)(x), theirs(x).last_hidden_state[:, 0])


def test_a_folder_of_a_transformers_classifier_keeps_its_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL_HF, num_labels=5)).eval()
    theirs.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_vit(tmp_path)(x), theirs(x).logits)


def hub_that_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def http_error(kind: str) -> Exception:
    errors = pytest.importorskip("huggingface_hub.errors")
    cls = getattr(errors, kind)
    return cls.__new__(cls)


@pytest.mark.parametrize(
    ("kind", "error", "remedy"),
    [
        ("GatedRepoError", PermissionError, "accept its terms at https://huggingface.co/MahmoodLab/UNI2-h"),
        ("RepositoryNotFoundError", FileNotFoundError, "hf auth login"),
        ("LocalEntryNotFoundError", ConnectionError, "hf download MahmoodLab/UNI2-h"),
        ("OfflineModeIsEnabled", ConnectionError, "pass its path"),
    ],
)
def test_gated_and_offline_models_say_what_to_do(kind, error, remedy, monkeypatch):
    hub_that_raises(http_error(kind), monkeypatch)
    with pytest.raises(error, match=remedy):
        load_vit("hf-hub:MahmoodLab/UNI2-h")


def test_a_bug_is_not_taken_for_a_missing_network(monkeypatch):
    hub_that_raises(KeyError("bug"), monkeypatch)
    with pytest.raises(KeyError, match="bug"):
        load_vit("hf-hub:MahmoodLab/UNI2-h")


def test_the_hub_tells_timms_models_from_transformers(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    path = tmp_path / "config.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(path))
    called = []
    monkeypatch.setattr("timm.create_model", lambda name, **kwargs: called.append((name, kwargs)) or nn.Linear(1, 1))
    monkeypatch.setattr(
        "transformers.AutoModel.from_pretrained",
        lambda name, **kwargs: called.append((name, kwargs)) or nn.Linear(1, 1),
    )
    path.write_text(json.dumps({"architecture": "vit_giant_patch14_224"}))
    with pytest.raises(ValueError, match="only timm"):
        load_vit("hf-hub:MahmoodLab/UNI2-h", dynamic_img_size=True)
    path.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(TypeError, match="takes a transformers model"):
        load_vit("hf-hub:owkin/phikon")
    assert called == [
        ("hf-hub:MahmoodLab/UNI2-h", {"pretrained": True, "dynamic_img_size": True}),
        ("owkin/phikon", {}),
    ]


def test_models_loaded_are_in_eval_mode_and_own_their_weights(tmp_path: Path):
    state: dict[str, Tensor] = random_vit().state_dict()
    model = from_state_dict(state, num_heads=3)
    assert not model.training
    with torch.no_grad():
        model.cls_token.zero_()
    assert (state["cls_token"] != 0).any()
