"""Extracted features equal those of a plain loop over the same coordinates, and every bad input has its message."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from runs import statuses
from small_slides import tissue_image, write_slide
from torch import nn

from maskattn.errors import ManifestError, SlideError
from maskattn.nn import TileEncoder, VisionTransformer
from maskattn.nn.encoders import EncoderCard
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.extraction import extract_slides
from maskattn.slide.extraction_record import ExtractionOutcome
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob
from maskattn.slide.reader import SlideReader
from maskattn.slide.summary import read_summary
from maskattn.slide.tile_places import tissue_share
from maskattn.slide.tissue import find_tissue

CARD = EncoderCard("small", "token", (0.5, 0.4, 0.6), (0.2, 0.3, 0.25), 64, 64, 1.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def small_encoder(card: EncoderCard = CARD, seed: int = 0) -> TileEncoder:
    torch.manual_seed(seed)
    vit = VisionTransformer(img_size=64, embed_dim=24, depth=2, num_heads=2)
    for weight in vit.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    return TileEncoder(vit.eval(), card)


@pytest.fixture(scope="module")
def encoder() -> TileEncoder:
    return small_encoder()


def extract(slide: Path, encoder: TileEncoder, out: Path, **settings: object) -> ExtractionOutcome:
    job = SlideJob(slide.stem, slide)
    (outcome,) = extract_slides([job], encoder, ExtractSettings(out, **settings))
    return outcome


def features_file(out: Path, outcome: ExtractionOutcome) -> Path:
    assert outcome.record is not None, outcome.reason
    return out / outcome.record.features


def plain_loop(slide: Path, encoder: TileEncoder, coords: np.ndarray, side_lv0: int, tile_px: int = 64) -> torch.Tensor:
    """Each tile through the transformer as a plain image, by torchvision's arithmetic and without a mask."""
    assert encoder.vit is not None
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.card.pixel_mean, encoder.card.pixel_std))
    features = []
    with SlideReader(slide) as reader, torch.inference_mode():
        for x, y in coords.tolist():
            tile = reader.read_region(x, y, (side_lv0, side_lv0), (tile_px, tile_px))
            image = (torch.from_numpy(tile).permute(2, 0, 1).float() / 255 - mean) / std
            features.append(encoder.vit(image[None])[0])
    return torch.stack(features)


def test_without_a_token_mask_features_are_those_of_a_plain_loop(slide: Path, encoder: TileEncoder, tmp_path: Path):
    outcome = extract(slide, encoder, tmp_path, batch_size=5)
    read = read_features(features_file(tmp_path, outcome))
    assert (read.encoder, read.token_mask, read.patch_size_px, read.spacing_um) == ("small", "none", 64, 1.0)
    expected = plain_loop(slide, encoder, read.coords_T2, 64)
    cosine = torch.cosine_similarity(torch.from_numpy(read.features_TC), expected)
    assert cosine.min() > 1 - 1e-6
    assert 10 < len(read.coords_T2) < 63
    assert outcome.record is not None
    assert outcome.record.kept_tokens == outcome.record.tokens == len(read.coords_T2) * 16
    with h5py.File(features_file(tmp_path, outcome)) as file:
        assert file["features"].attrs["token_mask"] == "none"


def test_with_a_token_mask_background_is_not_read(slide: Path, encoder: TileEncoder, tmp_path: Path):
    outcome = extract(slide, encoder, tmp_path, token_mask="tissue", min_tissue=0)
    read = read_features(features_file(tmp_path, outcome))
    assert read.token_mask == "tissue"
    assert outcome.record is not None
    assert 0 < outcome.record.kept_tokens < outcome.record.tokens
    with SlideReader(slide) as reader:
        tissue = find_tissue(reader)
        keep = torch.from_numpy(tissue_share(tissue, read.coords_T2, 64, 4) > 0)
        tiles = [reader.read_region(x, y, (64, 64), (64, 64)) for x, y in read.coords_T2.tolist()]
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = encoder.encode_tiles(pixels, keep)
        whole = encoder.encode_tiles(pixels)
    torch.testing.assert_close(torch.from_numpy(read.features_TC), expected, rtol=1e-4, atol=1e-5)
    partly = ~keep.flatten(1).all(dim=1)
    assert torch.cosine_similarity(whole, expected)[partly].min() < 0.999
    assert outcome.record.kept_tokens == int(keep.sum())


def test_tiles_are_cut_resized_and_overlapped_as_asked(slide: Path, encoder: TileEncoder, tmp_path: Path):
    outcome = extract(slide, encoder, tmp_path, magnification=5, patch_px=48, overlap_px=12)
    read = read_features(features_file(tmp_path, outcome))
    assert features_file(tmp_path, outcome).parent == tmp_path / "5x_48px_12px_overlap" / "features_small"
    assert (read.patch_size_px, read.patch_size_lv0, read.overlap_px, read.spacing_um) == (48, 96, 12, 2.0)
    assert not (read.coords_T2 % 72).any()
    expected = plain_loop(slide, encoder, read.coords_T2, 96)
    assert torch.cosine_similarity(torch.from_numpy(read.features_TC), expected).min() > 1 - 1e-6


def test_coordinates_of_another_run_replace_the_search(
    slide: Path, encoder: TileEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = extract(slide, encoder, tmp_path / "a", patch_px=32)
    monkeypatch.setattr("maskattn.slide.extraction_tiles.tissue_of", lambda *_, **__: pytest.fail("was sought"))
    second = extract(slide, encoder, tmp_path / "b", coords_dir=tmp_path / "a")
    one, other = (
        read_features(features_file(tmp_path / name, outcome))
        for name, outcome in zip("ab", (first, second), strict=True)
    )
    assert np.array_equal(one.coords_T2, other.coords_T2)
    assert np.allclose(one.features_TC, other.features_TC, atol=1e-6)
    assert second.record is not None
    assert second.record.tissue is None
    missing = replace(SlideJob("other", slide))
    (outcome,) = extract_slides([missing], encoder, ExtractSettings(tmp_path / "b", coords_dir=tmp_path / "a"))
    assert "must have a file of coordinates, got none for 'other'" in outcome.reason


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp", "slide2vec"])
def test_every_layout_holds_the_same_features(layout: str, slide: Path, encoder: TileEncoder, tmp_path: Path):
    outcome = extract(slide, encoder, tmp_path, layout=layout)
    plain = extract(slide, encoder, tmp_path / "plain")
    with SlideReader(slide) as reader:
        read = read_features(features_file(tmp_path, outcome), slide=reader.info)
    expected = read_features(features_file(tmp_path / "plain", plain))
    order, usual = (np.lexsort((tiles.coords_T2[:, 0], tiles.coords_T2[:, 1])) for tiles in (read, expected))
    assert np.array_equal(read.coords_T2[order], expected.coords_T2[usual])
    assert np.allclose(read.features_TC[order], expected.features_TC[usual], atol=2e-2)
    assert extract(slide, encoder, tmp_path, layout=layout).status == "skipped"
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("token_mask", ["none", "tissue"])
def test_lower_precision_is_near_float32(
    dtype: str, token_mask: str, slide: Path, encoder: TileEncoder, tmp_path: Path
):
    lower = extract(slide, encoder, tmp_path / "low", dtype=dtype, token_mask=token_mask)
    full = extract(slide, encoder, tmp_path / "full", token_mask=token_mask)
    low, high = (read_features(features_file(tmp_path / name, one)) for name, one in (("low", lower), ("full", full)))
    assert low.features_TC.dtype == (np.float16 if dtype == "float16" else np.float32)
    cosine = torch.cosine_similarity(*(torch.from_numpy(x.features_TC.astype(np.float32)) for x in (low, high)))
    assert 1 - 1e-2 < cosine.min() < 1


def test_a_finished_slide_is_skipped_and_other_settings_are_refused(slide: Path, encoder: TileEncoder, tmp_path: Path):
    first = extract(slide, encoder, tmp_path)
    before = features_file(tmp_path, first).stat().st_mtime_ns
    again = extract(slide, encoder, tmp_path, batch_size=3)
    assert (again.status, again.record) == ("skipped", first.record)
    for settings, told in (
        ({"token_mask": "tissue"}, "token_mask: none in .* and asked for tissue"),
        ({"min_tissue": 0.3}, "min_tissue: 0.1 in .* and asked for 0.3"),
        ({"dtype": "bfloat16"}, "dtype: float32 in .* and asked for bfloat16"),
        ({"slide_spacing_um": 1.1}, "slide_spacing_um: 1.0 in .* and asked for 1.1"),
    ):
        refused = extract(slide, encoder, tmp_path, **settings)
        assert refused.status == "failed"
        assert "as asked, got " in refused.reason
        assert re.search(told, refused.reason), refused.reason
    other = extract(slide, small_encoder(seed=1), tmp_path)
    assert "got encoder: small " in other.reason
    assert features_file(tmp_path, first).stat().st_mtime_ns == before
    anew = extract(slide, encoder, tmp_path, token_mask="tissue", overwrite=True)
    assert anew.status == "ok"
    assert read_features(features_file(tmp_path, anew)).token_mask == "tissue"


def test_features_that_another_tool_wrote_are_not_replaced(slide: Path, encoder: TileEncoder, tmp_path: Path):
    path = features_file(tmp_path, extract(slide, encoder, tmp_path))
    path.with_name("disc.extraction.json").unlink()
    data = path.read_bytes()
    assert "which another tool wrote" in extract(slide, encoder, tmp_path).reason
    assert path.read_bytes() == data
    assert extract(slide, encoder, tmp_path, overwrite=True).status == "ok"


def test_a_broken_slide_leaves_the_others_unharmed_and_is_in_the_summary(
    slide: Path, encoder: TileEncoder, tmp_path: Path
):
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    glass = write_slide(tmp_path / "glass.tiff", np.full((300, 300, 3), 244, np.uint8))
    jobs = [SlideJob("broken", tmp_path / "broken.svs"), SlideJob("glass", glass), SlideJob("disc", slide)]
    outcomes = extract_slides(jobs, encoder, ExtractSettings(tmp_path / "out"))
    assert statuses(outcomes) == {"broken": "failed", "glass": "failed", "disc": "ok"}
    assert "must show tissue, got none" in outcomes[1].reason
    rows = read_summary(tmp_path / "out" / "summary.csv")
    assert {name: row["status"] for name, row in rows.items()} == {"broken": "failed", "glass": "failed", "disc": "ok"}
    assert rows["disc"]["encoder"] == "small"
    assert rows["disc"]["token_mask"] == "none"
    assert int(rows["disc"]["tiles"]) > 10
    assert "prediction" not in rows["disc"]
    assert not list((tmp_path / "out").rglob("*.partial"))


class _Broken(nn.Module):
    """Features of which one is NaN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = x.mean(dim=(2, 3))
        features[-1, 1] = torch.nan
        return features


def test_features_that_are_not_finite_are_refused_and_nothing_is_left(slide: Path, tmp_path: Path):
    broken = TileEncoder(_Broken(), replace(CARD, pooling="own", why_not="it is a test's"), 3)
    outcome = extract(slide, broken, tmp_path)
    assert outcome.status == "failed"
    assert "features must be finite, got nan in the tile at x=" in outcome.reason
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"summary.csv"}


def test_half_written_files_of_a_killed_run_are_removed(slide: Path, encoder: TileEncoder, tmp_path: Path):
    path = features_file(tmp_path, extract(slide, encoder, tmp_path))
    for name in (".disc.h5", ".disc_patches.h5", ".disc2.h5", ".notes.txt"):
        path.with_name(f"{name}.1-0011aabb.partial").touch()
    assert extract(slide, encoder, tmp_path, overwrite=True).status == "ok"
    assert [left.name for left in tmp_path.rglob("*.partial")] == [".notes.txt.1-0011aabb.partial"]


def test_requests_that_contradict_themselves_are_refused_before_any_slide(
    slide: Path, encoder: TileEncoder, tmp_path: Path
):
    general = small_encoder(replace(CARD, spacing_um=None))
    swin = TileEncoder(_Broken(), replace(CARD, pooling="own", why_not="it is a Swin transformer"), 3)
    for chosen, settings, told in (
        (encoder, {"magnification": 20, "target_spacing_um": 0.5}, "one spacing, got --mag 20 and --spacing-um 0.5"),
        (encoder, {"target_spacing_um": 500}, "0.02 to 40 µm per pixel, got 500"),
        (encoder, {"overlap_px": 64}, "overlap by less than their side, got --overlap 64 of 64 px"),
        (general, {}, "tiles must have a spacing, got none, and the spacing at which small was trained is unknown"),
        (
            swin,
            {"token_mask": "tissue"},
            "packed vision transformer, got small: it is a Swin transformer; leave it out",
        ),
        (encoder, {"coords_dir": tmp_path, "patch_px": 32}, "got --patch-size 32 with --coords"),
        (encoder, {"coords_dir": tmp_path / "gone"}, "--coords must be a folder"),
        (encoder, {"coords_dir": tmp_path, "ink": "off"}, "got --ink off where no slide's tissue is"),
        (encoder, {"mask_values": (1,)}, "names labels of a mask, got 1 and no mask"),
    ):
        with pytest.raises(ManifestError) as refusal:
            extract(slide, chosen, tmp_path / "out", **settings)
        assert told in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_users_mask_and_the_slides_spacing_are_respected(slide: Path, encoder: TileEncoder, tmp_path: Path):
    from PIL import Image

    labels = np.zeros((42, 56), np.uint8)
    labels[:20, :20] = 7
    Image.fromarray(labels).save(tmp_path / "mask.png")
    job = SlideJob("disc", slide, mask_path=tmp_path / "mask.png")
    settings = ExtractSettings(tmp_path / "out", mask_values=(7,), slide_spacing_um=2.0)
    (outcome,) = extract_slides([job], encoder, settings)
    read = read_features(features_file(tmp_path / "out", outcome))
    assert read.patch_size_lv0 == 32
    assert read.coords_T2.max() < 200
    assert outcome.record is not None
    assert outcome.record.settings["mask"] == "mask.png"
    assert outcome.record.slide.spacing_source == "override"


def test_a_slide_without_a_spacing_says_which_option_gives_it_here(encoder: TileEncoder, tmp_path: Path):
    slide = write_slide(tmp_path / "bare.tiff", spacing_um=None)
    outcome = extract(slide, encoder, tmp_path / "out")
    assert "give the spacing with `--slide-spacing-um 0.5`" in outcome.reason
    assert extract(slide, encoder, tmp_path / "out", slide_spacing_um=1.0).status == "ok"


def test_an_aborted_run_leaves_nothing_half_written_and_can_be_continued(
    slide: Path, encoder: TileEncoder, tmp_path: Path
):
    class Stop:
        def slide_started(self, job: SlideJob) -> None: ...

        def slide_ended(self, outcome: ExtractionOutcome) -> None: ...

        def tiles_done(self, done: int, total: int) -> None:
            assert 0 < done < total
            raise KeyboardInterrupt

    settings = ExtractSettings(tmp_path, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        extract_slides([SlideJob("disc", slide)], encoder, settings, Stop())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert extract(slide, encoder, tmp_path).status == "ok"


def test_slide_that_is_written_to_while_it_runs_has_no_features(slide: Path, encoder: TileEncoder, tmp_path: Path):
    growing = tmp_path / "growing.tiff"
    growing.write_bytes(slide.read_bytes())

    class Grow:
        def slide_started(self, job: SlideJob) -> None: ...

        def slide_ended(self, outcome: ExtractionOutcome) -> None: ...

        def tiles_done(self, done: int, total: int) -> None:
            with growing.open("ab") as file:
                file.write(b"more")

    settings = ExtractSettings(tmp_path / "out", batch_size=4)
    (outcome,) = extract_slides([SlideJob("growing", growing)], encoder, settings, Grow())
    assert outcome.status == "failed"
    assert "must stay as it is while it runs" in outcome.reason
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == ["summary.csv"]
    assert extract(growing, encoder, tmp_path / "out").status == "ok"


def test_workers_and_batches_change_no_feature(slide: Path, encoder: TileEncoder, tmp_path: Path):
    one = extract(slide, encoder, tmp_path / "a", batch_size=3, token_mask="tissue")
    other = extract(slide, encoder, tmp_path / "b", batch_size=32, workers=1, token_mask="tissue")
    a, b = (read_features(features_file(tmp_path / name, outcome)) for name, outcome in (("a", one), ("b", other)))
    assert np.array_equal(a.coords_T2, b.coords_T2)
    assert np.allclose(a.features_TC, b.features_TC, rtol=1e-4, atol=1e-5)


def test_tiles_that_cannot_be_read_have_no_features(
    encoder: TileEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    slide = write_slide(tmp_path / "torn.tiff", tissue_image())
    whole = extract(slide, encoder, tmp_path / "whole")
    read = SlideReader.read_region

    def torn(self: SlideReader, x: int, y: int, *args: object, **more: object) -> np.ndarray:
        if (x, y) == (192, 192) and args == ((64, 64), (64, 64)):
            raise SlideError("it is torn")
        return read(self, x, y, *args, **more)

    monkeypatch.setattr(SlideReader, "read_region", torn)
    outcome = extract(slide, encoder, tmp_path / "torn")
    assert outcome.record is not None
    assert whole.record is not None
    assert outcome.record.unreadable_tiles == 1 == whole.record.tiles - outcome.record.tiles
    assert any("it is torn" in note for note in outcome.record.notes)
    assert [192, 192] in read_features(features_file(tmp_path / "whole", whole)).coords_T2.tolist()
    assert [192, 192] not in read_features(features_file(tmp_path / "torn", outcome)).coords_T2.tolist()


def test_the_record_says_how_the_features_came_about(slide: Path, encoder: TileEncoder, tmp_path: Path):
    path = features_file(tmp_path, extract(slide, encoder, tmp_path))
    record = json.loads(path.with_name("disc.extraction.json").read_text())
    assert record["encoder"] == {
        "name": "small",
        "sha256": encoder.sha256[:16],
        "width": 24,
        "pooling": "token",
        "packed": True,
        "licence": "",
    }
    assert record["settings"]["target_spacing_um"] == 1.0
    assert record["settings"]["patch_px"] == record["settings"]["tile_px"] == 64
    assert set(record["timings_s"]) >= {"open", "tissue", "tiles", "read", "encode", "write"}
    assert record["features"] == os.path.relpath(path, tmp_path)
