"""CTransPath from its authors' file of weights: features equal transformers' Swin transformer after the same stem."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("timm")
pytest.importorskip("transformers")

from transformers import SwinConfig, SwinModel

from maskattn.nn import load_encoder
from maskattn.nn.encoders.convolutional_stem import ConvolutionalStem

# transformers' names → those of the original Swin transformer, which the authors' file has.
RENAMED = (
    (r"^encoder\.", ""),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)


def reference_with_stem() -> tuple[SwinModel, dict[str, Tensor]]:
    """transformers' Swin-T with random weights, and a stem's weights by the authors' names."""
    torch.manual_seed(0)
    swin = SwinModel(SwinConfig(depths=[2, 2, 6, 2]), add_pooling_layer=False).eval()
    for name, parameter in swin.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.05)
    stem = {"0.weight": (12, 3, 3, 3), "3.weight": (24, 12, 3, 3), "6.weight": (96, 24, 1, 1), "6.bias": (96,)}
    weights = {name: torch.randn(shape) / 3 for name, shape in stem.items()}
    for layer, width in ((1, 12), (4, 24)):
        weights |= {f"{layer}.{name}": torch.randn(width) / 3 for name in ("weight", "bias", "running_mean")}
        weights |= {f"{layer}.running_var": torch.rand(width) + 0.5, f"{layer}.num_batches_tracked": torch.tensor(7)}
    return swin, weights


def authors_file(swin: SwinModel, stem: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the authors' file, a classifier and old buffers among them."""
    state: dict[str, Tensor] = {}
    for name, tensor in swin.state_dict().items():
        if name.startswith("embeddings.norm"):
            state[name.replace("embeddings", "patch_embed")] = tensor
        elif not name.startswith("embeddings"):
            for pattern, new in RENAMED:
                name = re.sub(pattern, new, name)
            state[name] = tensor
    for query in [name for name in state if ".attention.q_proj." in name]:
        joint = [state.pop(query.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[query.replace("attention.q_proj", "attn.qkv")] = torch.cat(joint)
    state |= {f"patch_embed.proj.{name}": tensor for name, tensor in stem.items()}
    state |= {"head.weight": torch.randn(1000, 768), "head.bias": torch.randn(1000)}
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return state


def stem_by_formula(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Tokens (B, 96, 56, 56) of images."""
    for layer in (0, 3):
        x = F.conv2d(x, w[f"{layer}.weight"], stride=2, padding=1)
        norm = {
            name: w[f"{layer + 1}.{name}"][:, None, None] for name in ("weight", "bias", "running_mean", "running_var")
        }
        x = (x - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
        x = x.clamp(min=0)
    return F.conv2d(x, w["6.weight"], w["6.bias"])


@torch.inference_mode()
def test_features_equal_those_of_transformers_swin_after_the_stem(tmp_path: Path):
    swin, stem = reference_with_stem()
    torch.save({"model": authors_file(swin, stem)}, tmp_path / "ctranspath.pth")
    encoder = load_encoder("ctranspath", weights=tmp_path / "ctranspath.pth")
    tiles = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)

    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.card.pixel_mean, encoder.card.pixel_std))
    tokens = stem_by_formula((tiles.float() / 255 - mean) / std, stem).flatten(2).transpose(1, 2)
    swin.embeddings.patch_embeddings.forward = lambda pixels: (tokens, (56, 56))
    expected = swin(torch.zeros(2, 3, 224, 224)).last_hidden_state.mean(1)

    assert encoder.embed_dim == 768
    torch.testing.assert_close(encoder.encode_tiles(tiles), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_are_in_no_hub_are_asked_for_with_the_page_that_has_them():
    with pytest.raises(FileNotFoundError, match=r"ctranspath are in no hub.*Xiyue-Wang/TransPath.*--weights"):
        load_encoder("ctranspath")


def test_weights_of_another_network_are_named(tmp_path: Path):
    torch.save({"model": {"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)}}, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match=r"weights must be those of ctranspath, got .*layers\.0\.blocks"):
        load_encoder("ctranspath", weights=tmp_path / "swin.pth")


def test_masked_attention_says_why_it_cannot_be_had():
    encoder = load_encoder("ctranspath", pretrained=False)
    tiles = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"ctranspath is none: it is a Swin transformer"):
        encoder.encode_tiles(tiles, torch.ones(1, 14, 14, dtype=torch.bool))


def test_the_stem_makes_tokens_of_4_px_only():
    with pytest.raises(ValueError, match=r"patches of 4 px, got patch_size=8"):
        ConvolutionalStem(patch_size=8)
