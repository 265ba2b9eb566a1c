"""Extraction within a region of interest, without what is excluded, and by the classes of a mask of outlines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from geojson_files import box, feature, polygon, write
from runs import AREAS_WITHOUT_EFFECT
from small_slides import write_slide

from maskattn.errors import ManifestError
from maskattn.nn import TileEncoder, VisionTransformer
from maskattn.nn.encoders import EncoderCard
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.extraction import extract_slides
from maskattn.slide.extraction_record import ExtractionOutcome
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob

CARD = EncoderCard("small", "token", (0.5, 0.4, 0.6), (0.2, 0.3, 0.25), 64, 64, 1.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder() -> TileEncoder:
    torch.manual_seed(0)
    return TileEncoder(VisionTransformer(img_size=64, embed_dim=24, depth=1, num_heads=2).eval(), CARD)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tiff")


def extracted(slide: Path, encoder: TileEncoder, settings: ExtractSettings, **job: Any) -> ExtractionOutcome:
    (outcome,) = extract_slides([SlideJob("disc", slide, **job)], encoder, settings)
    return outcome


def coords_of(settings: ExtractSettings, outcome: ExtractionOutcome) -> np.ndarray:
    assert outcome.record is not None, outcome.reason
    return read_features(settings.out_dir / outcome.record.features).coords_T2


def test_features_are_of_tiles_within_the_region_and_without_the_exclusion(
    slide: Path, encoder: TileEncoder, tmp_path: Path
) -> None:
    whole = ExtractSettings(tmp_path / "whole", min_tissue=0.5)
    everything = coords_of(whole, extracted(slide, encoder, whole))
    roi = write(tmp_path / "roi.geojson", feature(polygon(box(0, 0, 256, 420)), "Region*"))
    pen = write(
        tmp_path / "pen.geojson", feature(polygon(box(0, 0, 560, 192)), "Pen"), feature(polygon(box(0, 0, 9, 9)))
    )
    settings = replace(whole, out_dir=tmp_path / "some", roi=roi, exclude=pen, exclude_classes=("Pen",))
    outcome = extracted(slide, encoder, settings)
    some = coords_of(settings, outcome)
    assert len(some)
    left_and_below = (everything[:, 0] < 256) & (everything[:, 1] >= 192)
    np.testing.assert_array_equal(some, everything[left_and_below])
    assert outcome.record is not None
    assert outcome.record.tissue is not None
    assert outcome.record.tissue["method"].endswith(" within roi.geojson without pen.geojson")
    told = outcome.record.settings
    assert (told["roi"], told["roi_classes"]) == ("roi.geojson", None)
    assert (told["exclude"], told["exclude_classes"]) == ("pen.geojson", ["Pen"])


def test_a_finished_extraction_serves_where_the_same_areas_are_asked_for(
    slide: Path, encoder: TileEncoder, tmp_path: Path
) -> None:
    roi = write(tmp_path / "roi.geojson", feature(polygon(box(0, 0, 256, 420))))
    settings = ExtractSettings(tmp_path / "out", roi=roi)
    assert extracted(slide, encoder, settings).status == "ok"
    assert extracted(slide, encoder, settings).status == "skipped"
    other = extracted(slide, encoder, replace(settings, roi=None))
    assert other.status == "failed"
    assert "got roi: roi.geojson" in other.reason
    assert extracted(slide, encoder, replace(settings, roi=None, overwrite=True)).status == "ok"


def test_the_classes_of_a_mask_of_outlines_say_what_is_tissue(
    slide: Path, encoder: TileEncoder, tmp_path: Path
) -> None:
    mask = write(
        tmp_path / "mask.geojson",
        feature(polygon(box(64, 64, 192, 128)), "Tumor"),
        feature(polygon(box(256, 128, 512, 384)), "Stroma"),
    )
    settings = ExtractSettings(tmp_path / "out", mask_classes=("Tumor",))
    outcome = extracted(slide, encoder, settings, mask_path=mask)
    np.testing.assert_array_equal(coords_of(settings, outcome), [[64, 64], [128, 64]])
    assert outcome.record is not None
    assert (outcome.record.settings["mask"], outcome.record.settings["mask_classes"]) == ("mask.geojson", ["Tumor"])
    every = replace(settings, mask_classes=None)
    assert "got mask_classes: ['Tumor']" in extracted(slide, encoder, every, mask_path=mask).reason


def test_tokens_outside_the_region_are_dropped(slide: Path, encoder: TileEncoder, tmp_path: Path) -> None:
    settings = ExtractSettings(tmp_path / "whole", token_mask="tissue")
    whole = extracted(slide, encoder, settings).record
    roi = write(tmp_path / "roi.geojson", feature(polygon(box(0, 0, 288, 420))))
    half = extracted(slide, encoder, replace(settings, out_dir=tmp_path / "half", roi=roi)).record
    assert whole is not None
    assert half is not None
    assert 0 < half.kept_tokens < whole.kept_tokens
    # The region ends in the middle of a column of tiles.
    assert half.kept_tokens / half.tokens < whole.kept_tokens / whole.tokens


def test_a_slide_without_its_region_fails_alone(slide: Path, encoder: TileEncoder, tmp_path: Path) -> None:
    write(tmp_path / "a.geojson", feature(polygon(box(0, 0, 256, 420))))
    jobs = [SlideJob(name, slide) for name in ("a", "b")]
    first, second = extract_slides(jobs, encoder, ExtractSettings(tmp_path / "out", roi=tmp_path))
    assert first.status == "ok"
    assert "must have a file for each slide, got no b.geojson" in second.reason


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        *AREAS_WITHOUT_EFFECT,
        ({"exclude": Path(), "coords_dir": Path()}, "got . with --coords, which give the tiles"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    slide: Path, encoder: TileEncoder, tmp_path: Path, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(ManifestError) as refusal:
        extracted(slide, encoder, ExtractSettings(tmp_path / "out", **asked))
    assert words in str(refusal.value)
