"""``extract --region-size``: patches of regions in slide2vec's ``hierarchical_embeddings``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import statuses
from small_slides import write_slide
from torch import nn

from maskattn.errors import ManifestError
from maskattn.nn import TileEncoder, VisionTransformer, load_encoder
from maskattn.nn.encoders import EncoderCard
from maskattn.slide.extract_request import ExtractSettings, check_extraction
from maskattn.slide.extraction import extract_slides
from maskattn.slide.layouts.hierarchical import read_regions, regions_path
from maskattn.slide.manifest import SlideJob
from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue import find_tissue

PATCH, REGION = 32, 128


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder() -> TileEncoder:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, embed_dim=24, depth=2, num_heads=2)
    for weight in vit.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    return TileEncoder(vit.eval(), EncoderCard("small", "token", (0.5,) * 3, (0.5,) * 3, PATCH, PATCH, 1.0))


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tiff")


def asked(tmp_path: Path, **more: object) -> ExtractSettings:
    return ExtractSettings(tmp_path, layout="slide2vec", region_px=REGION, **more)


@pytest.mark.parametrize("token_mask", ["none", "tissue"])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_patches_of_regions_are_those_of_a_plain_loop(
    token_mask: str, batch_size: int, encoder: TileEncoder, slide: Path, tmp_path: Path
) -> None:
    settings = asked(tmp_path, token_mask=token_mask, batch_size=batch_size)
    (outcome,) = extract_slides([SlideJob("disc", slide)], encoder, settings)
    assert outcome.status == "ok", outcome.reason
    assert outcome.record.features == "hierarchical_embeddings/disc.pt"
    with SlideReader(slide) as reader:
        tissue = find_tissue(reader)
        found = read_regions(regions_path(tmp_path, "disc"), slide=reader.info, named=("disc",))
        assert found.features_TNC.shape[1:] == (16, 24)
        assert (found.patch_size_px, found.patch_size_lv0, found.token_mask) == (REGION, REGION, token_mask)
        full = np.zeros((4 * REGION, 5 * REGION), bool)
        rows, columns = (
            (np.arange(side) / px).astype(int).clip(0, tissue.mask_HW.shape[axis] - 1)
            for axis, side, px in ((0, 420, tissue.px_lv0[1]), (1, 560, tissue.px_lv0[0]))
        )
        full[:420, :560] = tissue.mask_HW[rows][:, columns]
        kept = [
            (x, y)
            for x in range(0, 560, REGION)
            for y in range(0, 420, REGION)
            if full[y : y + REGION, x : x + REGION].any()
        ]
        assert [tuple(place) for place in found.coords_T2.tolist()] == kept
        for region, (x, y) in enumerate(kept):
            for patch in range(16):
                left, top = x + patch % 4 * PATCH, y + patch // 4 * PATCH
                features = found.features_TNC[region, patch]
                if token_mask == "tissue":
                    assert bool(features.any()) == bool(full[top : top + PATCH, left : left + PATCH].any())
                    continue
                pixels = reader.read_region(left, top, (PATCH, PATCH), (PATCH, PATCH)).transpose(2, 0, 1).copy()
                with torch.no_grad():
                    expected = encoder.encode_tiles(torch.from_numpy(pixels)[None])[0].numpy()
                np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_finished_regions_are_skipped_and_other_requests_refused(
    encoder: TileEncoder, slide: Path, tmp_path: Path
) -> None:
    jobs = [SlideJob("disc", slide)]
    settings = asked(tmp_path, batch_size=64)
    assert statuses(extract_slides(jobs, encoder, settings)) == {"disc": "ok"}
    # What a killed run leaves half written is cleared up.
    left = tmp_path / "hierarchical_embeddings" / ".disc.pt.1234-abcd-rows.partial"
    left.touch()
    assert statuses(extract_slides(jobs, encoder, settings)) == {"disc": "skipped"}
    (outcome,) = extract_slides(jobs, encoder, replace(settings, token_mask="tissue"))
    assert outcome.status == "failed"
    assert "token_mask: none" in outcome.reason
    assert statuses(extract_slides(jobs, encoder, replace(settings, overwrite=True))) == {"disc": "ok"}
    assert not left.exists()
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "trident"}, r"slide2vec's layout, got --layout trident .*give --layout slide2vec"),
        ({"overlap_px": 8}, "start at the slide's corner, got --overlap 8"),
        ({"region_px": 100}, "two or more whole patches, got --region-size 100 with patches of 32 px; use 96"),
        ({"region_px": 32}, "got --region-size 32 with patches of 32 px; use 64"),
    ],
)
def test_impossible_regions_are_refused(
    change: dict[str, object], message: str, encoder: TileEncoder, slide: Path, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=message):
        check_extraction([SlideJob("disc", slide)], replace(asked(tmp_path), **change), encoder)


def test_hipts_patch_encoder_is_loaded_from_its_file(tmp_path: Path) -> None:
    vit = VisionTransformer(embed_dim=48, depth=2, num_heads=6, pos_embed_resample="dino")
    state = {f"module.backbone.{key}": x for key, x in vit.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "vit256_small_dino.pth")
    encoder = load_encoder("hipt", weights=tmp_path / "vit256_small_dino.pth")
    assert (encoder.name, encoder.tile_px, encoder.patch_px, encoder.spacing_um) == ("hipt", 256, 256, 0.5)
    tiles = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    with torch.no_grad():
        expected = vit.eval()((tiles / 255.0 - 0.5) / 0.5)
        torch.testing.assert_close(encoder.encode_tiles(tiles), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"on no hub, got none; give --weights vit256_small_dino\.pth"):
        load_encoder("hipt")
