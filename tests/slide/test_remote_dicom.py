"""DICOM slides at URLs: their series found, read in parts as OpenSlide reads a copy, or copied with all files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from fuzz_sources import DRAWINGS, baseline_jpeg, dicom
from runs import statuses
from slide_server import SlideServer, be_quick, left_in, serving
from small_slides import small_model, tissue_image
from tiffs import draw

from maskattn.errors import ManifestError
from maskattn.slide.formats.openslide_image import OpenSlideImage
from maskattn.slide.manifest import collect_jobs
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.placeholders import is_placeholder
from maskattn.slide.prediction import read_prediction
from maskattn.slide.remote import CacheSettings, Copies, fetch
from maskattn.slide.remote.slides import look_up_slide
from maskattn.slide.remote.stores import StoreError
from maskattn.slide.run import run_slides

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
dicom_image = pytest.importorskip("maskattn.slide.formats.dicom_image")

NAMES = [name for name in DRAWINGS if name.startswith("DICOM")]
# OpenSlide computes the first from the files' bytes; the others repeat what SlideImage has as attributes.
NOT_GIVEN = ("openslide.quickhash-1", "openslide.level", "openslide.associated")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlideServer]:
    be_quick(monkeypatch)
    monkeypatch.setattr(fetch, "_SMALL_BYTES", 0)
    with serving() as found:
        yield found


def served(server: SlideServer, folder: str, made_in: Path, name: str = "DICOM uncompressed") -> list[Path]:
    """Write a slide with tissue, and serve it; the level's files, the finest first."""
    made_in.mkdir()
    paths = DRAWINGS[name](made_in, tissue_image())
    for path in paths:
        server.files[f"/{folder}/{path.name}"] = path.read_bytes()
    return paths


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", [[0.000_246_5, 0.000_25], [0.001, 0.001]])
def test_wsidicom_gives_what_openslide_gives(tmp_path, name, spacing):
    paths = DRAWINGS[name](tmp_path, draw(448, 320))
    data = pydicom.dcmread(paths[0])
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = spacing
    data.save_as(paths[0])
    files = [path.open("rb", buffering=0) for path in paths]
    ours, theirs = dicom_image.DicomImage(files), OpenSlideImage(paths[0])
    for name in ("vendor", "level_dimensions", "level_downsamples", "level_tiles", "associated_images", "series"):
        assert getattr(ours, name) == getattr(theirs, name), name
    expected = {key: value for key, value in theirs.properties.items() if not key.startswith(NOT_GIVEN)}
    assert ours.properties == expected
    assert "openslide.mpp-x" in expected
    for level, (width, height) in enumerate(ours.level_dimensions):
        for box in ((0, 0, width, height), (width // 3, height // 4, width // 2, height // 3)):
            assert np.abs(ours.read(level, *box).astype(int) - theirs.read(level, *box)[..., :3]).max() <= 1
    for file in files:
        file.close()
    theirs.close()


@pytest.mark.parametrize("way", ["in parts", "whole", "without wsidicom"])
def test_a_series_at_a_url_is_run_as_on_a_disk(server, tmp_path, monkeypatch, way):
    paths = served(server, "CMU-1", tmp_path / "CMU-1")
    settings = {"cache_dir": tmp_path / "cache", "check": False}
    (job,) = collect_jobs([f"{server.url}/CMU-1/"])
    assert (job.slide_id, job.path.name) == ("CMU-1", paths[0].name)
    if way == "without wsidicom":
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "wsidicom.py").write_text("raise ImportError('it is not installed')")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Copies(CacheSettings(tmp_path / "cache", copy_whole=way == "whole")) as copies, copies.local(job) as here:
        assert is_placeholder(here.path) == (way == "in parts")
    outcomes = run_slides([job], small_model(), RunSettings(tmp_path / "there", copy_whole=way == "whole", **settings))
    outcomes += run_slides(
        collect_jobs([tmp_path / "CMU-1"]), small_model(), RunSettings(tmp_path / "here", **settings)
    )
    assert [(outcome.slide_id, outcome.reason) for outcome in outcomes] == [("CMU-1", ""), ("CMU-1", "")]
    there, local = (read_prediction(tmp_path / out / "CMU-1" / "prediction.json") for out in ("there", "here"))
    assert (there.logits, there.counts) == (local.logits, local.counts)
    assert there.slide.objective_power == local.slide.objective_power == 20
    assert there.slide.reader.startswith("wsidicom" if way == "in parts" else "openslide")
    assert left_in(tmp_path / "cache") == []


def test_other_series_of_a_folder_are_other_slides(server, tmp_path):
    served(server, "d", tmp_path / "one", "DICOM JPEG")
    first = look_up_slide(f"{server.url}/d/level_0.dcm")
    (tmp_path / "two").mkdir()
    for path in dicom(baseline_jpeg, sparse=False)(tmp_path / "two", draw(448, 320)):
        data = pydicom.dcmread(path)
        data.SeriesInstanceUID = "1.2.3"
        data.save_as(path)
        server.files[f"/d/other_{path.name}"] = path.read_bytes()
    server.files["/d/broken.dcm"] = b"no DICOM"
    assert look_up_slide(f"{server.url}/d/level_0.dcm") == first
    assert [Path(other.url).name for other in first.others] == ["level_1.dcm", "level_2.dcm"]
    jobs = collect_jobs([f"{server.url}/d/"])
    assert sorted(job.slide_id for job in jobs) == ["broken", "level_0", "other_level_0"]
    server.files["/d/level_2.dcm"] += b"\0"
    assert look_up_slide(f"{server.url}/d/level_0.dcm").etag != first.etag


def test_what_a_series_needs_of_its_store_is_said(server, tmp_path):
    served(server, "d", tmp_path / "d", "DICOM JPEG")
    server.files["/d/x.dcm"] = b"no DICOM"
    with pytest.raises(StoreError, match=r"must be of a series, got .*/d/x\.dcm, whose header names none"):
        look_up_slide(f"{server.url}/d/x.dcm")
    server.hidden = True
    with pytest.raises(StoreError, match="found in the list of its folder"):
        look_up_slide(f"{server.url}/d/level_0.dcm")
    server.hidden, server.ranges = False, False
    server.files["/e/level_0.dcm"], server.files["/e/b.dcm"] = server.files["/d/level_0.dcm"] + b"\0", b""
    with pytest.raises(StoreError, match="must be in a store that gives parts of files"):
        look_up_slide(f"{server.url}/e/level_0.dcm")
    with pytest.raises(ManifestError, match="must be in a store that gives parts of files"):
        collect_jobs([f"{server.url}/e/"])


def test_a_series_whose_files_change_in_the_middle_fails(server, tmp_path):
    served(server, "d", tmp_path / "d")
    (job,) = collect_jobs([f"{server.url}/d/"])
    look_up_slide(f"{server.url}/d/level_0.dcm")  # the headers are read

    def change(path: str) -> None:
        if path == "/d/level_1.dcm" and server.files[path][-1] != 1:  # when it was opened
            server.files[path] = server.files[path][:-1] + b"\1"

    server.before_end = change
    settings = RunSettings(tmp_path / "out", cache_dir=tmp_path / "cache", check=False)
    (outcome,) = outcomes = run_slides([job], small_model(), settings)
    assert statuses(outcomes) == {"d": "failed"}
    assert "a slide must stay as it is" in outcome.reason
    assert left_in(tmp_path / "cache") == []
