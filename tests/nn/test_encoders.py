"""Encoders by name: features equal those of the library's own network; unavailable ones say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("transformers")

import timm
import transformers
from safetensors.torch import save_file

from maskattn.nn import TileEncoder, VisionTransformer, from_timm, load_encoder
from maskattn.nn.encoders import EncoderCard, load_entry
from maskattn.nn.encoders.entry import EncoderEntry
from maskattn.nn.encoders.table import ENCODERS, entry_named, entry_of_hub, nearest_names
from maskattn.nn.encoders.timm_network import build_timm
from maskattn.nn.weight_files import start_reading

OF_TIMM = [entry for entry in ENCODERS.values() if entry.library == "timm" and entry.architecture and not entry.why_not]
by_name = pytest.mark.parametrize("entry", OF_TIMM, ids=lambda entry: entry.name)


def shallow(entry: EncoderEntry) -> EncoderEntry:
    """The encoder with its widths and all its parts, but of two blocks."""
    return replace(entry, arguments={**entry.arguments, "depth": 2})


def with_random_weights(network: nn.Module) -> nn.Module:
    for name, p in network.named_parameters():
        nn.init.normal_(p, std=1.0 if "gamma" in name else 0.05)
    return network.eval()


def tiles(side: int, B: int = 2) -> Tensor:
    return torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8)


def images(entry: EncoderEntry, pixels: Tensor) -> Tensor:
    """What the library's own network takes, by torchvision's arithmetic."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (entry.pixel_mean, entry.pixel_std))
    if entry.crop_px is not None:
        margin = (entry.tile_px - entry.crop_px) // 2
        pixels = pixels[:, :, margin : margin + entry.crop_px, margin : margin + entry.crop_px]
    return (pixels.float() / 255 - mean) / std


def pooled(entry: EncoderEntry, network: Any, x: Tensor) -> Tensor:
    """timm's features as the table pools them: the registers of Virchow2 are in no part."""
    if entry.pooling != "token_avg":
        return network(x)
    tokens = network.forward_features(x)
    return torch.cat([tokens[:, 0], tokens[:, network.num_prefix_tokens :].mean(dim=1)], dim=1)


def assert_same_features(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert torch.cosine_similarity(got, expected).min() > 1 - 1e-6
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@by_name
@torch.inference_mode()
def test_an_encoder_of_the_table_gives_timms_features_from_a_file_of_weights(entry: EncoderEntry, tmp_path: Path):
    entry = shallow(entry)
    theirs = with_random_weights(build_timm(replace(entry, file=""), None, {"pretrained": False}))
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    ours = load_entry(entry, weights=tmp_path / "weights.safetensors")
    assert isinstance(ours.vit, VisionTransformer), ours.why_not
    assert ours.embed_dim == entry.embed_dim
    pixels = tiles(entry.tile_px)
    assert_same_features(ours.encode_tiles(pixels), pooled(entry, theirs, images(entry, pixels)))


@by_name
def test_the_tables_arguments_build_a_network_of_the_tables_width(entry: EncoderEntry):
    with torch.device("meta"):
        network: Any = build_timm(replace(entry, file=""), None, {"pretrained": False})
    assert network.embed_dim * (2 if entry.pooling == "token_avg" else 1) == entry.embed_dim
    assert (entry.crop_px or entry.tile_px) % network.patch_embed.patch_size[0] == 0


@torch.inference_mode()
def test_registers_are_left_out_of_virchow2s_mean():
    entry = shallow(ENCODERS["virchow2"])
    theirs: Any = with_random_weights(build_timm(entry, None, {"pretrained": False}))
    tokens = theirs.forward_features(images(entry, pixels := tiles(224)))
    with_registers = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    torch.manual_seed(1)
    ours = load_entry(entry, pretrained=False)
    assert ours.vit is not None
    ours.vit.load_state_dict(theirs.state_dict())
    difference = (ours.encode_tiles(pixels) - with_registers).abs()
    assert difference[:, :1280].max() < 1e-3 < difference[:, 1280:].max()


def test_general_networks_have_timms_statistics_and_licences():
    for entry in ENCODERS.values():
        if entry.hub_id.startswith("timm/"):
            config = timm.get_pretrained_cfg(entry.architecture)
            assert (entry.pixel_mean, entry.pixel_std) == (config.mean, config.std), entry.name
            # The registry has Apache for CLIP as well, whose own licence is MIT.
            assert entry.licence.lower() in (config.license, "mit"), entry.name
            assert entry.spacing_um is None


def test_every_row_is_complete_and_names_its_source():
    for name, entry in ENCODERS.items():
        assert entry_named(name) is entry
        assert entry.licence, name
        assert entry.source, name
        assert entry.patch_px >= entry.tile_px > 0
        assert all(0 < value < 1 for value in (*entry.pixel_mean, *entry.pixel_std))
        assert bool(entry.why_not) == (entry.pooling == "own" or name in ("ctranspath", "hibou-b", "hibou-l"))
        assert entry.weights_at or entry_of_hub(entry.hub_id.upper()) is not None


def test_names_are_understood_as_other_tools_spell_them():
    spelt = {"uni_v2": "uni2-h", "UNI2-h": "uni2-h", "hoptimus1": "h-optimus-1", "conch_v15": "conch-v1.5"}
    spelt |= {"kaiko-vitb8": "kaiko-b8", "midnight12k": "midnight", "virchow_full": "virchow", "phikonv2": "phikon-v2"}
    for theirs, ours in spelt.items():
        assert entry_named(theirs) is ENCODERS[ours]
    assert entry_named("resnet50") is None


def test_the_table_is_read_without_torch():
    code = "import sys, maskattn.nn.encoders.table; print([n for n in ('torch', 'timm', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@torch.inference_mode()
def test_a_masked_tile_is_the_transformer_run_on_its_kept_tokens():
    encoder = load_encoder("timm:vit_tiny_patch16_224", pretrained=False, img_size=64)
    keep = torch.zeros(2, 4, 4, dtype=torch.bool)
    keep[0, :2], keep[1, 1:3, 1:] = True, True
    pixels = tiles(64)
    masked = encoder.encode_tiles(pixels, keep)
    assert encoder.vit is not None
    expected = encoder.vit((pixels / 255 - 0.5) / 0.5, keep)
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)
    pixels[0, :, 32:] = 255 - pixels[0, :, 32:]
    assert torch.equal(encoder.encode_tiles(pixels, keep)[0], masked[0])
    assert encoder.tile_tokens(pixels, keep).packing.total == int(keep.sum()) + 2


@torch.inference_mode()
def test_a_centre_is_cut_from_tiles_and_masks_alike():
    entry = shallow(ENCODERS["gigapath"])
    encoder = load_entry(entry, pretrained=False)
    pixels, keep = tiles(256, 1), torch.rand(1, 16, 16) > 0.5
    features = encoder.encode_tiles(pixels, keep)
    keep[:, [0, -1]] = ~keep[:, [0, -1]]
    pixels[:, :, :, :16] = 0
    assert torch.equal(encoder.encode_tiles(pixels, keep), features)
    with pytest.raises(ValueError, match="must fit into its image"):
        encoder.encode_tiles(tiles(128))


def test_the_digest_is_of_the_weights_alone():
    one, same, other = (load_encoder("timm:vit_tiny_patch16_224", pretrained=False) for _ in range(3))
    same.load_state_dict(one.state_dict())
    assert one.sha256 == same.sha256 != other.sha256
    assert len(one.sha256) == 64


@torch.inference_mode()
def test_a_network_that_is_no_vision_transformer_runs_as_its_library_built_it():
    encoder = load_encoder("timm:resnet18", pretrained=False)
    assert encoder.vit is None
    assert "ResNet cannot be turned into" in encoder.why_not
    pixels = tiles(224)
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.card.pixel_mean, encoder.card.pixel_std))
    assert encoder.module is not None
    torch.testing.assert_close(encoder.encode_tiles(pixels), encoder.module((pixels / 255 - mean) / std))
    assert encoder.embed_dim == 512
    for call in (encoder.encode_tiles, encoder.tile_tokens):
        with pytest.raises(ValueError, match="ResNet cannot be turned into"):
            call(pixels, torch.ones(2, 7, 7, dtype=torch.bool))


@torch.inference_mode()
def test_a_folder_of_transformers_says_how_it_is_fed(tmp_path: Path):
    config = transformers.Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56)
    theirs = with_random_weights(transformers.Dinov2Model(config))
    theirs.save_pretrained(tmp_path / "mine")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "crop_size": {"height": 42, "width": 42}}
    (tmp_path / "mine" / "preprocessor_config.json").write_text(json.dumps(processor))
    ours = load_encoder(tmp_path / "mine")
    assert (ours.name, ours.tile_px, ours.spacing_um, ours.pooling) == ("mine", 42, None, "token")
    pixels = tiles(42)
    x = (pixels / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    assert_same_features(ours.encode_tiles(pixels), theirs(x).last_hidden_state[:, 0])


@torch.inference_mode()
def test_midnight_joins_class_token_and_mean(monkeypatch: pytest.MonkeyPatch):
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 518}
    theirs = with_random_weights(transformers.Dinov2Model(transformers.Dinov2Config(**small, use_swiglu_ffn=True)))
    monkeypatch.setattr("maskattn.nn.encoders.loading.build_transformers", lambda *_: theirs)
    entry = replace(ENCODERS["midnight"], embed_dim=96)
    tokens = theirs(images(entry, pixels := tiles(224))).last_hidden_state
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    assert_same_features(load_entry(entry).encode_tiles(pixels), expected)


@torch.inference_mode()
def test_plip_is_its_image_tower_with_the_projection(monkeypatch: pytest.MonkeyPatch):
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.CLIPVisionConfig(**small, image_size=224, patch_size=32, projection_dim=40)
    theirs = with_random_weights(transformers.CLIPVisionModelWithProjection(config))
    monkeypatch.setattr("maskattn.nn.encoders.loading.build_transformers", lambda *_: theirs)
    ours = load_entry(entry := replace(ENCODERS["plip"], embed_dim=40))
    assert ours.vit is not None
    assert_same_features(ours.encode_tiles(pixels := tiles(224)), theirs(images(entry, pixels)).image_embeds)


def test_an_unknown_name_is_refused_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"got 'virchow3'; the nearest names: virchow, virchow2; `maskattn encoders`"):
        load_encoder("virchow3")
    with pytest.raises(ValueError, match=r"nearest: .*vit_base_patch16_224"):
        load_encoder("timm:vit_base_patch16_225")
    assert "uni2-h" in nearest_names("uni3")
    assert nearest_names("zzzz") == []


def test_code_of_a_hub_is_run_only_where_that_is_allowed():
    for name in ("hibou-l", "conch-v1.5"):
        with pytest.raises(PermissionError, match=r"loading it runs that code; read it .* --trust-code"):
            load_encoder(name)


@pytest.mark.parametrize("name", ["uni", "phikon-v2", "gpfm", "timm:vit_tiny_patch16_224", "hf-hub:nobody/nothing"])
def test_weights_that_cannot_be_had_offline_say_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"hub cannot be reached: .*`hf download .*`, copy the folder here"):
        load_encoder(name)


def test_weights_of_another_network_are_refused_by_their_keys(tmp_path: Path):
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    save_file(other.state_dict(), path := tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"weights must be those of uni, got .*it has no blocks.0.ls1.gamma; .*and \d+ more"
    ):
        load_encoder("uni", weights=path)
    with pytest.raises(ValueError, match=r"phikon is loaded by transformers, which takes a folder"):
        load_encoder("phikon", weights=path)
    with pytest.raises(ValueError, match=r"h0-mini is described only in its hub's config.json"):
        load_encoder("h0-mini", weights=path)


@torch.inference_mode()
def test_a_file_alone_needs_its_number_of_heads(tmp_path: Path):
    theirs = with_random_weights(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=64))
    save_file(theirs.state_dict(), path := tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"number of heads, .*timm:NAME --weights .*or give --num-heads"):
        load_encoder(path)
    with pytest.raises(FileNotFoundError, match="must exist"):
        load_encoder(tmp_path / "gone.safetensors")
    ours = load_encoder(path, num_heads=3)
    assert (ours.name, ours.tile_px) == ("mine", 64)
    pixels = tiles(64)
    entry = ENCODERS["uni"]
    assert_same_features(ours.encode_tiles(pixels), theirs(images(entry, pixels)))


def test_sides_that_are_not_a_multiple_of_the_token_are_refused():
    card = EncoderCard("mine", "token", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 60, 60)
    with pytest.raises(ValueError, match=r"multiple of the token's 16 px.*tile_px=60.*nearest sides are 48 and 64"):
        TileEncoder(VisionTransformer(img_size=64, embed_dim=24, depth=1, num_heads=2), card)
    with pytest.raises(TypeError, match="uint8 RGB pixels"):
        load_encoder("timm:vit_tiny_patch16_224", pretrained=False).encode_tiles(torch.rand(1, 3, 224, 224))


def test_weights_read_in_a_thread_are_those_of_the_file_and_so_are_its_errors(tmp_path: Path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:100])
    assert torch.equal(start_reading(tmp_path / "a.pth")()["a"], torch.arange(3))
    waits = [start_reading(tmp_path / f"{name}.pth") for name in "bc"]
    with pytest.raises(ValueError, match=r"must be a complete file.*b\.pth"):
        waits[0]()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*c\.pth"):
        waits[1]()


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_are_held_once_while_a_network_is_loaded(ending: str, tmp_path: Path):
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0).eval()
    path = tmp_path / f"tiny.{ending}"
    save_file(theirs.state_dict(), path) if ending == "safetensors" else torch.save(theirs.state_dict(), path)
    entry = EncoderEntry("tiny", "", "timm", "", 192, "token", (0.5,) * 3, (0.5,) * 3, 224, 224, None, "", "",
                         architecture="vit_tiny_patch16_224", arguments={"depth": 1})  # fmt: skip
    network = build_timm(entry, path, {})
    assert not any(x.is_meta for x in (*network.parameters(), *network.buffers()))
    assert all(parameter.requires_grad for parameter in network.parameters())
    taken = {name: x.data_ptr() for name, x in network.named_parameters()}
    ours, copied = from_timm(network, copy=False), from_timm(network)
    assert {name: x.data_ptr() for name, x in ours.named_parameters()} == taken
    assert not set(taken.values()) & {x.data_ptr() for x in copied.parameters()}
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(network(images), theirs(images))
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours(images), copied(images))
