"""A slide that is opened ahead, and its tissue found, gives the same outputs as one that is opened in its turn."""

from __future__ import annotations

import pickle
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slides import damage_tile, make_blank_slide, write_pyramid
from small_slides import write_slide

from maskattn.cli import slide_runs
from maskattn.errors import SlideError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide import opened_ahead
from maskattn.slide.formats import isolated_image
from maskattn.slide.formats.decoding_process import DecodingProcess
from maskattn.slide.formats.isolated_image import IsolatedImage
from maskattn.slide.manifest import SlideJob
from maskattn.slide.opened_ahead import open_ahead, open_slide, tissue_of
from maskattn.slide.reader import SlideReader
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.tissue import InkRule, TissueMask, find_tissue
from maskattn.slide.unchanged import FileState

AS_USUAL: tuple[InkRule, bool] = ("auto", False)


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """What is decoded, as (level, left, top, width, height); nothing is left open for the next test."""
    asked: list[tuple[int, ...]] = []
    read = IsolatedImage.read

    def noted(image: IsolatedImage, *place: int) -> np.ndarray:
        asked.append(place)
        return read(image, *place)

    monkeypatch.setattr(IsolatedImage, "read", noted)
    yield asked
    for opening in opened_ahead._ahead:
        found = opening.found()
        if found is not None:
            found[1].close()
    opened_ahead._ahead.clear()


def wait() -> None:
    """Until what is opened ahead is open, and its tissue found."""
    for opening in opened_ahead._ahead:
        opening.found()


def test_tissue_is_found_on_the_view_that_was_read_ahead(slide: Path, reads: list[tuple[int, ...]]) -> None:
    job = SlideJob("disc", slide)
    with SlideReader(slide, isolated=True) as plain:
        expected = find_tissue(plain)
        thumbnail = plain.thumbnail(100)
    reads.clear()
    open_ahead(job, None, None, tissue=AS_USUAL)
    wait()
    ahead = list(reads)
    assert ahead
    state, reader = open_slide(job, None, None)
    with reader:
        assert state == FileState.of(slide)
        found = find_tissue(reader)
        assert reads == ahead, "the view was decoded twice"
        np.testing.assert_array_equal(found.mask_HW, expected.mask_HW)
        assert (found.method, found.notes, found.tissue_fraction) == (
            expected.method,
            expected.notes,
            expected.tissue_fraction,
        )
        np.testing.assert_array_equal(find_tissue(reader).mask_HW, expected.mask_HW)  # decoded anew
        assert len(reads) == 2 * len(ahead)
        np.testing.assert_array_equal(reader.thumbnail(100), thumbnail)


def facts_of(mask: TissueMask) -> tuple[object, ...]:
    return mask.mask_HW.tobytes(), mask.method, mask.notes, mask.tissue_fraction


def test_tissue_found_ahead_is_not_sought_again(
    slide: Path, reads: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SlideReader(slide, isolated=True) as plain:
        expected = facts_of(find_tissue(plain))
    sought: list[SlideReader] = []

    def noted(reader: SlideReader, **options: Any) -> TissueMask:
        sought.append(reader)
        return find_tissue(reader, **options)

    monkeypatch.setattr(opened_ahead, "find_tissue", noted)
    open_ahead(SlideJob("disc", slide), None, None, tissue=AS_USUAL)
    _, reader = open_slide(SlideJob("disc", slide), None, None)
    with reader:
        before = len(reads)
        assert facts_of(tissue_of(reader, *AS_USUAL)) == expected
        assert (len(sought), len(reads)) == (1, before)
        assert facts_of(tissue_of(reader, *AS_USUAL)) == expected  # sought anew
        assert (len(sought), len(reads) > before) == (2, True)


@pytest.mark.parametrize("otherwise", [("off", False), ("auto", True)])
def test_tissue_found_in_another_way_is_sought_again_on_the_same_view(
    slide: Path, reads: list[tuple[int, ...]], otherwise: tuple[InkRule, bool]
) -> None:
    open_ahead(SlideJob("disc", slide), None, None, tissue=otherwise)
    _, reader = open_slide(SlideJob("disc", slide), None, None)
    with reader, SlideReader(slide, isolated=True) as plain:
        before = len(reads)
        found = tissue_of(reader, *AS_USUAL)
        assert len(reads) == before
        assert facts_of(found) == facts_of(find_tissue(plain))


def test_a_slide_whose_tissue_cannot_be_sought_fails_in_its_turn(tmp_path: Path, reads: list[tuple[int, ...]]) -> None:
    rgb_HW3 = np.random.default_rng(0).integers(0, 20, (512, 512, 3), np.uint8)
    dark = write_pyramid(tmp_path / "dark.tif", rgb_HW3, 0.5, downsamples=(4,))
    with SlideReader(dark, isolated=True) as plain, pytest.raises(SlideError) as expected:
        find_tissue(plain)
    open_ahead(SlideJob("dark", dark), None, None, tissue=AS_USUAL)
    _, reader = open_slide(SlideJob("dark", dark), None, None)
    with reader:
        before = len(reads)
        with pytest.raises(SlideError) as met:
            tissue_of(reader, *AS_USUAL)
        assert str(met.value) == str(expected.value)
        assert len(reads) == before, "the view was decoded twice"


def test_another_read_comes_first_and_a_copy_has_nothing_of_the_view(slide: Path, reads: list[tuple[int, ...]]) -> None:
    open_ahead(SlideJob("disc", slide), None, None, tissue=AS_USUAL)
    _, reader = open_slide(SlideJob("disc", slide), None, None)
    with reader, SlideReader(slide) as plain:
        copy = pickle.loads(pickle.dumps(reader))
        assert copy._coming is copy._tissue is None
        assert reader._coming is not None
        np.testing.assert_array_equal(copy.thumbnail(50), plain.thumbnail(50))
        np.testing.assert_array_equal(reader.thumbnail(50), plain.thumbnail(50))
        before = len(reads)
        np.testing.assert_array_equal(find_tissue(reader).mask_HW, find_tissue(plain).mask_HW)
        assert len(reads) > before
        assert facts_of(tissue_of(reader, *AS_USUAL)) == facts_of(find_tissue(plain))


def test_without_a_view_or_for_a_slide_that_is_elsewhere_nothing_is_read(
    slide: Path, reads: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ahead(SlideJob("disc", slide), None, None, tissue=None)
    wait()
    assert reads == []
    opened_ahead._ahead.clear()
    open_ahead(SlideJob("bad", slide, problem="it is named twice"), None, None, tissue=AS_USUAL)
    assert opened_ahead._ahead == []


@pytest.mark.parametrize("other", ["slide", "series", "spacing", "its own spacing"])
def test_a_slide_of_another_request_is_opened_anew(slide: Path, tmp_path: Path, other: str) -> None:
    job, spacing_um, series = SlideJob("disc", slide), None, None
    open_ahead(job, spacing_um, series, tissue=AS_USUAL)
    if other == "slide":
        job = SlideJob("other", Path(shutil.copy(slide, tmp_path / "other.tiff")))
    elif other == "series":
        series = 0
    elif other == "spacing":
        spacing_um = 2.0
    else:
        job = replace(job, spacing_um=3.0)
    opening = opened_ahead._ahead[0]
    _, reader = open_slide(job, spacing_um, series)
    with reader:
        assert type(reader) is SlideReader
        assert reader.path == job.path
        assert opened_ahead._ahead == []
        sources = {"spacing": (2.0, "override"), "its own spacing": (3.0, "manifest")}
        assert (reader.info.spacing_um, reader.info.spacing_source) == sources.get(other, (1.0, "metadata"))
        found = opening.found()
        assert found is not None
        assert found[1]._image is None, "it was not closed"


def test_what_fails_ahead_fails_in_its_turn_with_the_same_message(tmp_path: Path) -> None:
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"II*\0 no slide")
    for job in (SlideJob("gone", tmp_path / "gone.svs"), SlideJob("broken", broken)):
        with pytest.raises(SlideError) as expected:
            open_slide(job, None, None)
        open_ahead(job, None, None, tissue=AS_USUAL)
        with pytest.raises(SlideError) as met:
            open_slide(job, None, None)
        assert str(met.value) == str(expected.value)


@pytest.mark.parametrize("request_that_hangs", ["open", "read"])
def test_a_decoder_that_hangs_is_not_waited_for_twice(
    slide: Path, model: SlideModel, settings: RunSettings, monkeypatch: pytest.MonkeyPatch, request_that_hangs: str
) -> None:
    monkeypatch.setattr(isolated_image, "_ANSWERS_WITHIN_S", 3.0)
    monkeypatch.setattr(isolated_image, "_idle", [])
    ask, hung = DecodingProcess.ask, []

    def hanging(self: DecodingProcess, request: str, *arguments: object) -> object:
        if request == request_that_hangs:
            hung.append(self)
            self._process.send_signal(signal.SIGSTOP)
        return ask(self, request, *arguments)

    monkeypatch.setattr(DecodingProcess, "ask", hanging)
    open_ahead(SlideJob("hangs", slide), None, None, tissue=AS_USUAL)
    (failed,) = run_slides([SlideJob("hangs", slide)], model, settings)
    assert failed.status == "failed"
    assert "must answer within 3 s" in failed.reason
    assert len(hung) == 1


def test_a_slide_without_a_spacing_can_be_opened_ahead(tmp_path: Path) -> None:
    job = SlideJob("bare", write_slide(tmp_path / "bare.tiff", spacing_um=None))
    open_ahead(job, None, None, tissue=AS_USUAL)
    _, reader = open_slide(job, None, None)
    with reader, pytest.raises(SlideError, match="spacing"):
        find_tissue(reader)


@pytest.mark.parametrize("asked_for", ["the view", "the tissue", "neither"])
def test_damage_counts_when_the_view_or_its_tissue_is_asked_for(tmp_path: Path, asked_for: str) -> None:
    path = make_blank_slide(tmp_path / "damaged.tif")
    damage_tile(path, 0, level=1)
    with SlideReader(path, isolated=True) as plain:
        expected = find_tissue(plain).notes, plain.notes
    assert any("cannot be decoded" in note for note in expected[0])
    open_ahead(SlideJob("damaged", path), None, None, tissue=AS_USUAL)
    _, reader = open_slide(SlideJob("damaged", path), None, None)
    with reader:
        assert reader.notes == ()
        if asked_for == "the view":
            assert (find_tissue(reader).notes, reader.notes) == expected
        elif asked_for == "the tissue":
            assert (tissue_of(reader, *AS_USUAL).notes, reader.notes) == expected
        else:
            reader.read_region(0, 0, (64, 64), (64, 64))
            assert reader.notes == ()


def test_a_slide_that_changes_after_it_was_opened_ahead_fails(
    slide: Path, model: SlideModel, settings: RunSettings, tmp_path: Path
) -> None:
    path = Path(shutil.copy(slide, tmp_path / "disc.tiff"))
    open_ahead(SlideJob("disc", path), None, None, tissue=AS_USUAL)
    wait()
    path.write_bytes(path.read_bytes() + b"more")
    (outcome,) = run_slides([SlideJob("disc", path)], model, settings)
    assert outcome.status == "failed"
    assert "chang" in outcome.reason
    assert not (settings.out_dir / "disc").exists()


def test_a_run_gives_the_same_outputs(slide: Path, model: SlideModel, tmp_path: Path) -> None:
    made = {}
    for name in ("plain", "ahead"):
        settings = RunSettings(tmp_path / name, batch_size=8)
        if name == "ahead":
            open_ahead(SlideJob("disc", slide), None, None, tissue=AS_USUAL)
        (outcome,) = run_slides([SlideJob("disc", slide)], model, settings)
        assert outcome.status == "ok", outcome.reason
        made[name] = {
            path.name: path.read_bytes() for path in (tmp_path / name / "disc").iterdir() if path.suffix != ".json"
        }
        assert outcome.prediction is not None
        made[name]["scores"] = repr((outcome.prediction.scores, outcome.prediction.counts)).encode()
    assert made["plain"] == made["ahead"]


def test_a_command_opens_the_first_slide_of_its_share_if_it_is_alone(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated_image, "_idle", [])
    jobs = [SlideJob(name, Path(shutil.copy(slide, tmp_path / f"{name}.tiff"))) for name in "abc"]

    def opened(settings: RunSettings, *, alone: bool) -> list[str]:
        opened_ahead._ahead.clear()
        slide_runs.start_reading(jobs, settings, None, alone=alone, finds_tissue=True)
        wait()
        return [opening.named[0].stem for opening in opened_ahead._ahead]

    settings = RunSettings(tmp_path / "out")
    assert opened(settings, alone=False) == []
    assert len(isolated_image._idle) == 1
    assert opened(settings, alone=True) == ["a"]
    assert opened(replace(settings, shard="2/3"), alone=True) == ["b"]
    settings.out_dir.mkdir()
    (settings.out_dir / "summary.csv").touch()
    assert opened(settings, alone=True) == []
    assert opened(replace(settings, overwrite=True), alone=True) == ["a"]
