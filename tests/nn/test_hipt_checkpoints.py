"""What HIPT and soma trained, loaded by layout, against their own code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from original_hipt import GlobalHIPT, LocalHIPT
from torch import Tensor, nn

from maskattn.nn import HIPT, HIPTHead, RegionModel, VisionTransformer, load_hipt, load_slide_head
from maskattn.nn.adapters.conversion import UnsupportedModelError
from maskattn.nn.hipt_checkpoints import hipt_from_state_dict


def drawn(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double().eval()


def saved(tmp_path: Path, model: nn.Module, wrap: str | None = None) -> Path:
    state = model.state_dict() if wrap is None else {wrap: {f"module.{k}": v for k, v in model.state_dict().items()}}
    torch.save(state, tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.mark.parametrize("wrap", [None, "state_dict"])
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("side", [3, 2, 4])
def test_unmasked_logits_of_the_local_model_are_those_of_the_original(
    side: int, registers: int, wrap: str | None, tmp_path: Path
) -> None:
    original = drawn(LocalHIPT(classes=3, registers=registers))
    model = load_hipt(saved(tmp_path, original, wrap))
    assert isinstance(model, RegionModel)
    features = torch.randn(5, side * side, 48, dtype=torch.float64)
    with torch.no_grad():
        embeddings, keep = model.embed_regions(features)
        assert keep.all()
        torch.testing.assert_close(embeddings, original.regions(features), rtol=1e-5, atol=1e-5)
        logits = model(embeddings, torch.ones(1, 5, dtype=torch.bool))
        torch.testing.assert_close(logits, original(features)[0], rtol=1e-5, atol=1e-5)
        attention = model.slide_encoder.attention(embeddings)[0]
        torch.testing.assert_close(attention, original.pooled(original.regions(features))[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
def test_masked_logits_are_those_of_the_originals_masked_attention(registers: int, tmp_path: Path) -> None:
    original = drawn(LocalHIPT(classes=2, registers=registers))
    model = load_hipt(saved(tmp_path, original))
    features = torch.randn(6, 9, 48, dtype=torch.float64)
    pct = (torch.rand(6, 9, 4) < 0.2).double() * torch.rand(6, 9, 4)
    pct[:, 0] = 0.5
    keep = pct.sum(dim=-1) > 0
    assert not keep.all()
    with torch.no_grad():
        embeddings, with_tissue = model.embed_regions(features, keep)
        assert with_tissue.all()
        logits = model(embeddings, torch.ones(2, 3, dtype=torch.bool))
        torch.testing.assert_close(logits, original(features, pct)[0], rtol=1e-5, atol=1e-5)
        # The pixels of glass patches change nothing, bit for bit.
        other = torch.where(keep[:, :, None], features, torch.nan)
        assert torch.equal(model.embed_regions(other, keep)[0], embeddings)


def test_regions_of_glass_are_left_out_of_their_slide(tmp_path: Path) -> None:
    original = drawn(LocalHIPT(classes=2))
    model = load_hipt(saved(tmp_path, original))
    features, keep = torch.randn(4, 9, 48, dtype=torch.float64), torch.ones(4, 9, dtype=torch.bool)
    keep[2] = False
    with torch.no_grad():
        embeddings, with_tissue = model.embed_regions(features, keep)
        assert with_tissue.tolist() == [True, True, False, True]
        logits = model(embeddings, with_tissue.view(2, 2))
        torch.testing.assert_close(logits, original(features[with_tissue])[0], rtol=1e-5, atol=1e-5)
        nothing, none = model.embed_regions(features, torch.zeros_like(keep))
    assert nothing.shape == (0, 24)
    assert not none.any()
    with pytest.raises(ValueError, match="T ≥ 1 tiles"):
        model(nothing, none.view(2, 2))


def region_weights(tmp_path: Path, original: LocalHIPT) -> Path:
    state = {f"module.backbone.{key}": x for key, x in original.vit_region.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "vit4k_xs_dino.pth")
    return tmp_path / "vit4k_xs_dino.pth"


def test_the_global_model_takes_the_region_vits_own_weights(tmp_path: Path) -> None:
    local, original = drawn(LocalHIPT(classes=2)), drawn(GlobalHIPT(3, 24, 24))
    path = saved(tmp_path, original)
    model = load_hipt(path, region_weights=region_weights(tmp_path, local))
    features = torch.randn(4, 9, 48, dtype=torch.float64)
    with torch.no_grad():
        logits = model(model.embed_regions(features)[0], torch.ones(2, 2, dtype=torch.bool))
        torch.testing.assert_close(logits, original(local.regions(features))[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs the region ViT's own weights, got none"):
        load_hipt(path)
    with pytest.raises(ValueError, match="got both"):
        load_hipt(saved(tmp_path, local), region_weights=tmp_path / "vit4k_xs_dino.pth")


def small_patch_encoder(embed_dim: int = 48) -> VisionTransformer:
    encoder = VisionTransformer(img_size=32, embed_dim=embed_dim, depth=2, num_heads=6, pos_embed_resample="dino")
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.3)
    return encoder.double().eval()


def test_with_a_patch_encoder_it_is_the_three_levels_from_pixels_to_logits(tmp_path: Path) -> None:
    original, patches = drawn(LocalHIPT(classes=3)), small_patch_encoder()
    model = load_hipt(saved(tmp_path, original), patches, patch_px=32, pixel_mean=(0.7, 0.5, 0.6))
    assert isinstance(model, HIPT)
    regions = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)
    mean = torch.tensor((0.7, 0.5, 0.6), dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        embeddings, _ = model.encode_regions(regions)
        cut = regions.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # [M, 9, 3, p, p]
        features = patches((cut.flatten(0, 1) / 255.0 - mean) / 0.5).unflatten(0, (4, 9))
        torch.testing.assert_close(embeddings, original.regions(features), rtol=1e-5, atol=1e-5)
        logits = model(embeddings, torch.ones(2, 2, dtype=torch.bool))
        torch.testing.assert_close(logits, original(features)[0], rtol=1e-5, atol=1e-5)


def test_glass_of_pixels_is_never_read_bit_for_bit(tmp_path: Path) -> None:
    model = load_hipt(saved(tmp_path, drawn(LocalHIPT(classes=3))), small_patch_encoder(), patch_px=32)
    regions = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)
    keep = torch.rand(4, 6, 6) < 0.3
    keep[:, 0, 0] = True
    keep[1] = False
    glass = ~keep.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(regions)
    with torch.no_grad():
        embeddings, with_tissue = model.encode_regions(regions, keep)
        other, same = model.encode_regions(torch.where(glass, 255 - regions, regions), keep)
    assert with_tissue.tolist() == same.tolist() == [True, False, True, True]
    assert torch.equal(embeddings, other)
    assert not torch.equal(model.encode_regions(regions)[0][[0, 2, 3]], embeddings)


def changed(state: dict[str, Tensor], **tensors: Tensor | None) -> dict[str, Tensor]:
    both = {**state, **{name.replace("__", "."): x for name, x in tensors.items()}}
    return {name: x for name, x in both.items() if x is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_attn_pool__attention_b__0__weight": None}, "it has no global_attn_pool.attention_b.0.weight"),
        ({"global_extra__weight": torch.zeros(3)}, "global_extra.weight has no place"),
        ({"global_rho__0__bias": torch.zeros(5)}, r"global_rho.0.bias is \(5,\) instead of \(12,\)"),
        ({"classifier__weight": None}, "must have the key classifier.weight"),
        ({"global_phi__0__weight": None, "global_phi__0__bias": None}, "must be one of CLAM"),
        ({"vit_region__blocks__1__norm1__weight": None}, "blocks.1.norm1.weight"),
        ({"vit_region__blocks__1__what": torch.zeros(2)}, "blocks.1.what"),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_named(change: dict[str, Tensor | None], message: str) -> None:
    state = changed(drawn(LocalHIPT(classes=2)).state_dict(), **change)
    with pytest.raises(UnsupportedModelError, match=message):
        hipt_from_state_dict(state)


def test_a_patch_encoder_of_another_width_is_refused() -> None:
    state = drawn(LocalHIPT(classes=2)).state_dict()
    with pytest.raises(ValueError, match=r"patch and region encoder .* width 24 and in_chans=48"):
        hipt_from_state_dict(state, small_patch_encoder(24), patch_px=32)
    model = hipt_from_state_dict(state)
    with pytest.raises(ValueError, match=r"must be \(B, n·n, 48\) embeddings of their patches, got \(2, 9, 24\)"):
        model.embed_regions(torch.zeros(2, 9, 24))
    with pytest.raises(ValueError, match=r"got \(2, 8, 48\)"):
        model.embed_regions(torch.zeros(2, 8, 48))
    with pytest.raises(ValueError, match="got a HIPTHead"):
        model.slide_tokens(torch.zeros(1, 24), torch.ones(1, 1, dtype=torch.bool))


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    original = drawn(LocalHIPT(classes=2))
    torch.save({**original.state_dict(), "x": Harmful(tmp_path / "mark")}, tmp_path / "best.pt")
    assert isinstance(load_hipt(tmp_path / "best.pt"), RegionModel)
    assert not (tmp_path / "mark").exists()


def test_a_slide_level_alone_is_one_of_the_slide_heads(tmp_path: Path) -> None:
    original = drawn(GlobalHIPT(3, 24, 12))
    found = load_slide_head(saved(tmp_path, original))
    assert (found.layout, found.head.kind) == ("HIPT", "hipt")
    regions = torch.randn(7, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(found.head(regions), original(regions)[0], rtol=1e-5, atol=1e-5)
    again = HIPTHead(**found.head.arguments()).double().eval()
    again.load_state_dict(found.head.state_dict())
    assert torch.equal(again(regions), found.head(regions))
    with pytest.raises(UnsupportedModelError, match=r"load it with maskattn\.nn\.load_hipt"):
        load_slide_head(saved(tmp_path, drawn(LocalHIPT(classes=2))))


def test_a_level_to_be_trained_has_gradients_everywhere() -> None:
    level = HIPTHead(24, 3, embed_dim=12).train()
    level(torch.randn(7, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in level.parameters())
