"""A run with HIPT's own checkpoint: regions instead of tiles, from the slide to predictions and maps of tokens."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from dense_vit import dense_masked_logits
from original_hipt import LocalHIPT
from runs import lengths_given_to
from small_slides import write_slide
from torch import nn

from maskattn.errors import ManifestError
from maskattn.explain import FactorisedAttention, ThreeLevelCDAM
from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.nn import HIPT, TileEncoder, VisionTransformer, load_two_stages
from maskattn.nn.encoders import EncoderCard
from maskattn.nn.encoders.regions import RegionEncoder
from maskattn.nn.hipt_checkpoints import hipt_from_state_dict
from maskattn.nn.slide_models.pooling import PooledHead
from maskattn.nn.slide_models.two_stage import TwoStageModel
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.extraction import extract_slides
from maskattn.slide.layouts import read_features
from maskattn.slide.layouts.hierarchical import read_regions
from maskattn.slide.manifest import SlideJob
from maskattn.slide.prediction import read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.regions import encode_stored_regions
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides

PATCH, REGION, CLASSES = 32, 128, ("benign", "low", "high")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original() -> LocalHIPT:
    torch.manual_seed(0)
    model = LocalHIPT(classes=3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def patches() -> TileEncoder:
    vit = VisionTransformer(img_size=32, embed_dim=48, depth=2, num_heads=6, pos_embed_resample="dino")
    for p in vit.parameters():
        nn.init.normal_(p, std=0.2)
    return TileEncoder(vit.eval(), EncoderCard("vit256", "token", (0.5,) * 3, (0.5,) * 3, PATCH, PATCH, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, original: LocalHIPT) -> Path:
    folder = tmp_path_factory.mktemp("hipt")
    write_slide(folder / "disc.tiff")
    torch.save(original.state_dict(), folder / "best.pt")
    return folder


def test_unmasked_scores_of_a_run_are_those_of_the_original_layout(
    folder: Path, original: LocalHIPT, patches: TileEncoder, tmp_path: Path
) -> None:
    model = load_two_stages(folder / "best.pt", patches, classes=CLASSES, patch_px=REGION)
    assert isinstance(model.encoder, RegionEncoder)
    (outcome,) = run_slides([SlideJob("disc", folder / "disc.tiff")], model, RunSettings(tmp_path, check=False))
    assert outcome.status == "ok", outcome.reason
    found = read_features(tmp_path / "disc" / "features.h5")
    assert (found.patch_size_lv0, found.features_TC.shape[1]) == (REGION, 24)
    features = []
    every = torch.ones(16, 2, 2, dtype=torch.bool)
    with SlideReader(folder / "disc.tiff") as reader, torch.no_grad():
        for x, y in found.coords_T2.tolist():
            pixels = torch.from_numpy(reader.read_region(x, y, (REGION, REGION), (REGION, REGION)).copy())
            region = (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5
            cut = region.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(0, 1)
            features.append(dense_masked_logits(patches.vit, cut, every))
        expected = original(torch.stack(features))[0]
    logits = outcome.prediction.logits
    np.testing.assert_allclose([logits[name] for name in CLASSES], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_a_masked_run_has_maps_of_tokens_that_are_those_of_three_levels(
    folder: Path, original: LocalHIPT, patches: TileEncoder, tmp_path: Path
) -> None:
    model = load_two_stages(folder / "best.pt", patches, classes=CLASSES, patch_px=REGION, token_mask="tissue")
    settings = RunSettings(tmp_path, tokens=True, batch_size=32)
    jobs = [SlideJob("disc", folder / "disc.tiff")]
    (outcome,) = run_slides(jobs, model, settings)
    assert outcome.status == "ok", outcome.reason
    whole = hipt_from_state_dict(original.state_dict(), patches.vit, patch_px=PATCH)
    assert isinstance(whole, HIPT)
    found = read_features(tmp_path / "disc" / "features.h5")
    assert found.token_mask == "tissue"
    with h5py.File(tmp_path / "disc" / "relevance.h5") as file:
        keep, tokens = file["tokens/keep"][:], file["tokens/relevance"][:]
        of_regions, attention = file["tiles/relevance"][:], file["tokens/attention"][:]
    assert keep.shape == (len(found.coords_T2), 8, 8)
    assert 0 < keep.mean() < 1
    assert not tokens[:, ~keep].any()
    assert not attention[~keep].any()
    assert (attention[keep] > 0).all()
    pixels = []
    with SlideReader(folder / "disc.tiff") as reader:
        for x, y in found.coords_T2.tolist():
            pixels.append(reader.read_region(x, y, (REGION, REGION), (REGION, REGION)).transpose(2, 0, 1).copy())
    regions, kept = torch.from_numpy(np.stack(pixels)), torch.from_numpy(keep)
    embeddings, with_tissue = whole.encode_regions(regions, kept)
    assert with_tissue.all()
    np.testing.assert_allclose(found.features_TC, embeddings.detach().numpy(), rtol=1e-4, atol=1e-4)
    cdam = ThreeLevelCDAM(whole)
    slide = cdam.slide(embeddings, torch.ones(1, len(regions), dtype=torch.bool))
    maps = cdam.regions(regions, kept, slide.gradient_KTC)
    np.testing.assert_allclose(of_regions, slide.relevance_KT.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(tokens, maps.tokens_KBhw.numpy(), rtol=1e-3, atol=1e-4)
    factorised = FactorisedAttention(whole)
    of_slide = factorised.slide(embeddings, torch.ones(1, len(regions), dtype=torch.bool))
    combined = factorised.regions(regions, kept, of_slide).combined_Bhw
    np.testing.assert_allclose(attention, combined.numpy(), rtol=1e-3, atol=1e-4)
    for name in ("heatmap_high.png", "attention.png"):
        assert (tmp_path / "disc" / name).is_file()
    assert read_prediction(tmp_path / "disc" / "prediction.json").model.classes == CLASSES
    (again,) = run_slides(jobs, model, settings)
    assert again.status == "skipped"


def test_one_region_is_read_at_a_time(
    folder: Path, patches: TileEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_two_stages(folder / "best.pt", patches, classes=CLASSES, patch_px=REGION, token_mask="tissue")
    held = lengths_given_to(RegionEncoder, "encode_tiles", monkeypatch)
    run_slides([SlideJob("disc", folder / "disc.tiff")], model, RunSettings(tmp_path, batch_size=32, check=False))
    assert held
    assert set(held) == {1}


@pytest.fixture(scope="module", params=["none", "tissue"])
def stored(request, folder: Path, patches: TileEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored")
    settings = ExtractSettings(out, layout="slide2vec", region_px=REGION, token_mask=request.param)
    (outcome,) = extract_slides([SlideJob("disc", folder / "disc.tiff")], patches, settings)
    assert outcome.status == "ok", outcome.reason
    return out


def test_stored_features_of_patches_give_the_scores_and_the_maps_of_their_patches(
    stored: Path, folder: Path, original: LocalHIPT, tmp_path: Path
) -> None:
    (file,) = (stored / "hierarchical_embeddings").glob("*.pt")
    model, whole = load_two_stages(folder / "best.pt", classes=CLASSES), hipt_from_state_dict(original.state_dict())
    settings = RunSettings(tmp_path / "alone", features_dir=stored, tokens=True)
    (outcome,) = run_slides([SlideJob("disc", file)], model, settings)
    assert outcome.status == "ok", outcome.reason
    held = read_regions(file)
    encoded = encode_stored_regions(held, whole)
    expected = whole(encoded.embeddings_TC, encoded.keep_HW)
    logits = [outcome.prediction.logits[name] for name in CLASSES]
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    cdam = SlideHeadCDAM(whole.slide_encoder, region_level=whole.region_encoder)
    of_regions = cdam.tiles(encoded.embeddings_TC)
    features, keep = torch.from_numpy(held.features_TNC), torch.from_numpy(held.keep_TN)
    features, keep = features[encoded.rows_T], keep[encoded.rows_T]
    maps = cdam.patches(features, keep, of_regions.gradient_KTC)
    with h5py.File(tmp_path / "alone" / "disc" / "relevance.h5") as table:
        np.testing.assert_allclose(table["tiles/relevance"][:], of_regions.relevance_KT.numpy(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(table["tokens/relevance"][:], maps.relevance_KBHW.numpy(), rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(table["tokens/keep"][:].reshape(keep.shape), keep.numpy())
    # Regions' scores are the sums over their patches plus what lies on none.
    total = maps.relevance_KBHW.sum((2, 3)) + maps.unmapped_KB
    torch.testing.assert_close(total, of_regions.relevance_KT, rtol=1e-2, atol=1e-3)
    assert any("token maps need the pixels" in note for note in outcome.prediction.notes)
    # With the slide there are pictures, and the scores are the same.
    settings = RunSettings(tmp_path / "both", features_dir=stored, tokens=True)
    (shown,) = run_slides([SlideJob("disc", folder / "disc.tiff")], model, settings)
    assert shown.status == "ok", shown.reason
    assert shown.prediction.logits == pytest.approx(outcome.prediction.logits, abs=1e-5)
    assert (tmp_path / "both" / "disc" / "heatmap_high.png").is_file()


def test_stored_features_with_the_slide_and_the_encoder_give_the_token_maps_of_a_complete_run(
    stored: Path, folder: Path, patches: TileEncoder, tmp_path: Path
) -> None:
    mask = read_regions(next((stored / "hierarchical_embeddings").glob("*.pt"))).token_mask
    model = load_two_stages(folder / "best.pt", patches, classes=CLASSES, patch_px=REGION, token_mask=mask)
    jobs, found = [SlideJob("disc", folder / "disc.tiff")], []
    for name, features in (("given", stored), ("made", None)):
        (outcome,) = run_slides(jobs, model, RunSettings(tmp_path / name, features_dir=features, tokens=True))
        assert outcome.status == "ok", outcome.reason
        with h5py.File(tmp_path / name / "disc" / "relevance.h5") as table:
            found.append((outcome.prediction.logits, table["tokens/relevance"][:], table["coords"][:]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    np.testing.assert_array_equal(found[0][2], found[1][2])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-2, atol=1e-4)


def test_stored_features_that_do_not_fit_the_model_are_refused(stored: Path, folder: Path, tmp_path: Path) -> None:
    (file,) = (stored / "hierarchical_embeddings").glob("*.pt")
    torch.manual_seed(0)
    wide = {"img_size": 4, "patch_size": 1, "in_chans": 40, "embed_dim": 24, "depth": 1, "num_heads": 6}
    of_regions = load_two_stages(folder / "best.pt", classes=CLASSES)
    narrow = TwoStageModel(of_regions.head, of_regions.card, region_level=VisionTransformer(**wide)).eval()
    of_tiles = TwoStageModel(PooledHead(24, 3), replace(of_regions.card, kind="pooled")).eval()
    for model, message in (
        (narrow, "the region level's input width, got 48 channels in .* and 40 for best"),
        (of_tiles, r"need a model with a region level \(vit_region\), got best \(pooled\)"),
    ):
        (outcome,) = run_slides([SlideJob("disc", file)], model, RunSettings(tmp_path, features_dir=stored))
        assert outcome.status == "failed"
        assert re.search(message, outcome.reason), outcome.reason
        assert not (tmp_path / "disc").exists()


def test_a_model_of_regions_needs_the_encoder_of_their_patches_or_their_features(
    folder: Path, patches: TileEncoder, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=r"with an encoder of patches, got none .*--encoder hipt --weights"):
        run_slides([SlideJob("disc", folder / "disc.tiff")], load_two_stages(folder / "best.pt"), RunSettings(tmp_path))
    with pytest.raises(
        ValueError, match="a multiple of the patch's, at least two, got 100 px of patches of 32 px; take 96"
    ):
        load_two_stages(folder / "best.pt", patches, patch_px=100)
    resized = TileEncoder(patches.vit, EncoderCard("uni", "token", (0.5,) * 3, (0.5,) * 3, 32, 64, 0.5))
    with pytest.raises(ValueError, match="neither resizes nor crops them, got uni: it resizes or crops"):
        load_two_stages(folder / "best.pt", resized, patch_px=REGION)


def test_regions_of_an_encoder_without_tissue_have_embeddings_of_zeros(patches: TileEncoder) -> None:
    region = VisionTransformer(img_size=4, patch_size=1, in_chans=48, embed_dim=24, depth=1, num_heads=6)
    encoder = RegionEncoder(patches, region.eval(), REGION)
    assert (encoder.tile_px, encoder.token_px, encoder.embed_dim, encoder.spacing_um) == (REGION, 16, 24, 1.0)
    tiles = torch.randint(0, 256, (2, 3, REGION, REGION), dtype=torch.uint8)
    keep = torch.zeros(2, 8, 8, dtype=torch.bool)
    keep[1, 3, 4] = True
    with torch.no_grad():
        found = encoder.encode_tiles(tiles, keep)
    assert not found[0].any()
    assert found[1].any()
    assert encoder.sha256 != patches.sha256
