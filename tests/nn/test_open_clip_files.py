"""Folders and repositories of open_clip: their configuration, weights and pixels, read without open_clip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_open_clip import DEPTH, HEADS, PATCH, SIDE, SPACE, C, PlainTower, checkpoint
from torch import Tensor, nn

timm = pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")

from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError  # noqa: E402 (as above)

from maskattn.nn import load_encoder, load_vit  # noqa: E402 (timm may not be there)
from maskattn.nn.encoders import load_entry  # noqa: E402 (as above)
from maskattn.nn.encoders.table import ENCODERS  # noqa: E402 (as above)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION = {"image_size": SIDE, "layers": DEPTH, "width": C, "patch_size": PATCH, "head_width": C // HEADS}
TINY = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_kwargs": {"depth": 2, "img_size": SIDE}}


def write(
    folder: Path, state: dict[str, Tensor], vision: dict[str, Any], *, safe: bool = True, **more: Any
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    if safe:
        save_file({key: x.contiguous() for key, x in state.items()}, folder / "open_clip_model.safetensors")
    else:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    pixels = more.pop("preprocess_cfg", None)
    config = {"model_cfg": {"embed_dim": SPACE, "vision_cfg": vision, **more}}
    config |= {} if pixels is None else {"preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return config


def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: type[Exception] = EntryNotFoundError) -> list[str]:
    """Hugging Face's hub with the files of a folder; the names of those that are asked for."""
    asked: list[str] = []

    def download(repository: str, name: str) -> str:
        asked.append(name)
        if not (folder / name).is_file():
            raise missing.__new__(missing)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def pixels_of(side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)


def as_fed(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    return (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("safe", [True, False])
@torch.inference_mode()
def test_a_repository_without_config_json_loads_from_open_clips_files(safe, tmp_path, monkeypatch):
    tower, pixels = PlainTower("quick_gelu").eval(), pixels_of()
    write(tmp_path, checkpoint(tower), VISION, safe=safe, quick_gelu=True)
    asked = hub(tmp_path, monkeypatch)
    x = as_fed(pixels, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(load_vit("hf-hub:lab/clip")(x), tower(x), rtol=1e-4, atol=1e-4)
    assert asked[:2] == ["config.json", "open_clip_config.json"]
    encoder = load_encoder("hf-hub:lab/clip")
    torch.testing.assert_close(encoder.encode_tiles(pixels), tower(x), rtol=1e-4, atol=1e-4)
    assert (encoder.name, encoder.embed_dim, encoder.pooling, encoder.why_not) == (
        "hf-hub:lab/clip",
        SPACE,
        "token",
        "",
    )


@torch.inference_mode()
def test_open_clips_files_in_the_cache_load_without_a_network(tmp_path, monkeypatch):
    tower, x = PlainTower().eval(), torch.randn(1, 3, SIDE, SIDE)
    write(tmp_path, checkpoint(tower), VISION)
    hub(tmp_path, monkeypatch, LocalEntryNotFoundError)
    torch.testing.assert_close(load_vit("hf-hub:lab/clip")(x), tower(x), rtol=1e-4, atol=1e-4)
    assert load_encoder("hf-hub:lab/clip").embed_dim == SPACE


@pytest.mark.parametrize("load", [load_vit, load_encoder])
def test_a_repository_that_cannot_be_read_says_what_to_do(load, tmp_path, monkeypatch):
    hub(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"must have config\.json or open_clip_config\.json.*got lab/clip with"):
        load("hf-hub:lab/clip")
    write(tmp_path, checkpoint(PlainTower()), VISION)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must have open_clip_model\.safetensors or open_clip_pytorch_model"):
        load("hf-hub:lab/clip")
    hub(tmp_path / "nothing", monkeypatch, LocalEntryNotFoundError)
    with pytest.raises(ConnectionError, match="hf download lab/clip"):
        load("hf-hub:lab/clip")
    hub(tmp_path / "nothing", monkeypatch, GatedRepoError)
    with pytest.raises(PermissionError, match="accept its terms"):
        load("hf-hub:lab/clip")


@torch.inference_mode()
def test_a_file_beside_a_repository_is_not_left_unread(tmp_path, monkeypatch):
    hubs, mine = PlainTower().eval(), PlainTower().eval()
    write(tmp_path, checkpoint(hubs), VISION)
    nn.init.normal_(mine.proj)
    torch.save(checkpoint(mine), path := tmp_path / "mine.pt")
    hub(tmp_path, monkeypatch)
    pixels = pixels_of()
    features = load_encoder("hf-hub:lab/clip", weights=path).encode_tiles(pixels)
    torch.testing.assert_close(features, mine(as_fed(pixels, CLIP_MEAN, CLIP_STD)), rtol=1e-4, atol=1e-4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match=r"hf-hub:lab/clip is loaded by transformers, which takes a folder, got the"):
        load_encoder("hf-hub:lab/clip", weights=path)


@torch.inference_mode()
def test_a_folder_is_an_encoder_with_the_pixels_that_it_states(tmp_path):
    tower, mean, std = PlainTower().eval(), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    pixels = pixels_of()
    write(tmp_path / "mine", checkpoint(tower), VISION, preprocess_cfg={"mean": mean, "std": std, "size": SIDE})
    encoder = load_encoder(tmp_path / "mine")
    assert (encoder.name, encoder.tile_px, encoder.patch_px, encoder.spacing_um) == ("mine", SIDE, SIDE, None)
    torch.testing.assert_close(encoder.encode_tiles(pixels), tower(as_fed(pixels, mean, std)), rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match=r"a config\.json or open_clip_config\.json, got neither"):
        load_encoder(tmp_path)


def test_without_them_pixels_are_clips_and_the_side_is_the_networks(tmp_path):
    state = checkpoint(PlainTower())
    write(tmp_path, state, VISION)
    card = load_encoder(tmp_path).card
    assert (card.pixel_mean, card.pixel_std, card.tile_px) == (CLIP_MEAN, CLIP_STD, SIDE)
    # open_clip builds its images for the network, whatever is said of them.
    write(tmp_path, state, VISION, preprocess_cfg={"size": [32, 32]})
    assert load_encoder(tmp_path).tile_px == SIDE
    write(tmp_path, state, {key: x for key, x in VISION.items() if key != "image_size"}, preprocess_cfg={"size": 32})
    assert load_encoder(tmp_path).tile_px == 32
    write(tmp_path, state, {**VISION, "image_size": [SIDE, 2 * SIDE]})
    with pytest.raises(ValueError, match="tiles are square"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", ["quiltnet-b16", "quiltnet-b32"])
@torch.inference_mode()
def test_quiltnet_loads_from_a_file_a_folder_and_the_hub_and_is_masked(name, tmp_path, monkeypatch):
    tower, entry = PlainTower().eval(), replace(ENCODERS[name], embed_dim=SPACE)
    write(tmp_path, checkpoint(tower), VISION, safe=False)
    hub(tmp_path, monkeypatch)
    pixels, keep = pixels_of(224), torch.rand(2, 14, 14) > 0.5
    sources = (tmp_path, tmp_path / "open_clip_pytorch_model.bin", None)
    one, two, three = (load_entry(entry, weights=source) for source in sources)
    assert one.sha256 == two.sha256 == three.sha256
    assert (one.card.pixel_mean, one.card.pixel_std) == (CLIP_MEAN, CLIP_STD)
    whole, masked = one.encode_tiles(pixels), one.encode_tiles(pixels, keep)
    glass = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(pixels)
    assert torch.equal(one.encode_tiles(pixels.masked_fill(glass, 255), keep), masked)
    assert not torch.allclose(whole, masked)
    with pytest.raises(ValueError, match=f"{name} has features of width 512, got a network of {SPACE}"):
        load_encoder(name, weights=tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"need the open_clip_config\.json .* states their activation"):
        load_entry(entry, weights=tmp_path / "open_clip_pytorch_model.bin")


def trunk_and_state(**arguments: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    trunk = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=SIDE, **arguments).eval()
    for p in trunk.parameters():
        nn.init.normal_(p, std=0.1)
    return trunk, {f"visual.trunk.{key}": x for key, x in trunk.state_dict().items()}


@pytest.mark.parametrize("pool", ["", "avg", "token", None])
@torch.inference_mode()
def test_a_folder_with_a_trunk_of_timms_says_heads_pool_and_epsilon(pool, tmp_path):
    trunk, state = trunk_and_state(num_classes=0)
    projection, x = torch.randn(SPACE, 192), torch.randn(2, 3, SIDE, SIDE)
    write(
        tmp_path,
        state | {"visual.head.proj.weight": projection},
        {**TINY, "image_size": SIDE, **({} if pool is None else {"timm_pool": pool})},
    )
    ours = load_vit(tmp_path)
    assert (ours.num_heads, ours.arguments["norm_eps"]) == (3, 1e-6)
    tokens = trunk.forward_features(x)
    pooled = tokens[:, 1:].mean(dim=1) if pool in ("avg", None) else tokens[:, 0]
    torch.testing.assert_close(ours(x), F.linear(pooled, projection), rtol=1e-4, atol=1e-4)
    assert load_encoder(tmp_path).embed_dim == SPACE
    torch.testing.assert_close(load_vit(tmp_path, num_classes=0)(x), pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("projection", "width"), [("none", 0), (None, SPACE)])
@torch.inference_mode()
def test_a_trunk_whose_own_pooling_ends_in_the_space_of_texts_needs_no_projection(projection, width, tmp_path):
    trunk, state = trunk_and_state(num_classes=width, global_pool="map", class_token=False)
    vision = {**TINY, "timm_pool": "map", "timm_proj": projection, "image_size": SIDE}
    vision["timm_model_kwargs"] = {**TINY["timm_model_kwargs"], "class_token": False}
    write(tmp_path, state, vision)
    x = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(load_vit(tmp_path)(x), trunk(x), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_options_of_norms_and_activations_are_read(tmp_path):
    tower, x = PlainTower().eval(), torch.randn(1, 3, SIDE, SIDE)
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"
    options = {"norm_kwargs": {"eps": 1e-2}, "act_kwargs": {"approximate": "tanh"}}
    write(tmp_path, checkpoint(tower), {**VISION, **options})
    ours = load_vit(tmp_path)
    torch.testing.assert_close(ours(x), tower(x), rtol=1e-4, atol=1e-4)
    assert (ours.arguments["act_layer"], ours.arguments["norm_eps"]) == ("gelu_tanh", 1e-2)


@pytest.mark.parametrize(
    ("vision", "told"),
    [
        ({**VISION, "norm_kwargs": {"bias": False}}, r"norm_kwargs=\{'bias': False\}"),
        ({**VISION, "attentional_pool": True}, "attentional_pool=True"),
        ({**VISION, "global_average_pool": True}, "global_average_pool=True"),
        ({**TINY, "timm_model_name": "vit_of_nobody"}, "timm .* has no model 'vit_of_nobody'"),
        ({**TINY, "timm_pool": "abs_attn"}, "timm_pool='abs_attn'"),
        ({"timm_model_name": "convnext_atto"}, "ConvNeXt cannot be turned into"),
    ],
)
def test_what_ours_lacks_is_named_by_the_configuration(vision, told, tmp_path):
    write(tmp_path, checkpoint(PlainTower()), vision)
    with pytest.raises(ValueError, match=told):
        load_vit(tmp_path)
