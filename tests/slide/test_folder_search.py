"""A search of a folder or a glob finds every slide in it and says in a sentence what else it holds."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import openslide
import pytest

from maskattn.errors import ManifestError
from maskattn.slide.formats.dicom_series import SeriesFile, read_series_file
from maskattn.slide.manifest import SlideJob, collect_jobs, folder_search
from maskattn.slide.manifest.folder_search import SLIDE_SUFFIXES


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def collected(*sources: Path | str) -> tuple[dict[str, SlideJob], list[str]]:
    notes: list[str] = []
    return {job.slide_id: job for job in collect_jobs(sources, notes.append)}, notes


def test_folder_gives_slides_of_every_ending_by_name(tmp_path: Path) -> None:
    touch(tmp_path, *(f"s{number:02}{suffix}" for number, suffix in enumerate(SLIDE_SUFFIXES)), "x.OME.TIF", "y.NDPI")
    jobs, notes = collected(tmp_path)
    assert list(jobs) == [*(f"s{number:02}" for number in range(len(SLIDE_SUFFIXES))), "x", "y"]
    assert not notes


@pytest.mark.parametrize("source", [".", "*.tif"])
def test_broken_link_and_loop_of_links_are_slides_that_fail(tmp_path: Path, source: str) -> None:
    touch(tmp_path, "here.tif")
    (tmp_path / "gone.tif").symlink_to("/not/mounted/gone.tif")
    (tmp_path / "loop.tif").symlink_to("loop.tif")
    jobs, _ = collected(tmp_path / source)
    assert list(jobs) == ["gone", "here", "loop"]
    assert "a link to /not/mounted/gone.tif, which does not exist" in str(jobs["gone"].problem)
    assert "leads back to itself" in str(jobs["loop"].problem)
    assert jobs["here"].problem is None


def test_broken_link_with_a_globs_characters_is_not_taken_for_a_glob(tmp_path: Path) -> None:
    (tmp_path / "s[1].tif").symlink_to("/gone.tif")
    jobs, _ = collected(tmp_path / "s[1].tif")
    assert "a link to /gone.tif" in str(jobs["s[1]"].problem)


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["a.xlsx", "b.XLSX", "c.czi"], "passed over 3 files that are no slides: 2 .xlsx, 1 .czi"),
        (["a.czi"], "passed over 1 file that is no slide: 1 .czi"),
        (["README"], "passed over 1 file that is no slide: 1 without an ending"),
        (["more/b.svs"], "passed over 1 folder in it (to search all below it: "),
        (["a.txt", "x/b.svs", "y/b.svs"], "1 file that is no slide: 1 .txt; 2 folders in it"),
    ],
)
def test_skipped_files_are_counted_and_reported(tmp_path: Path, names: list[str], note: str) -> None:
    touch(tmp_path, "here.tif", *names)
    jobs, notes = collected(tmp_path)
    assert list(jobs) == ["here"]
    (said,) = notes
    assert said.startswith(f"in {tmp_path}, passed over ")
    assert note in said


def test_command_that_a_note_proposes_is_quoted(tmp_path: Path) -> None:
    folder = touch(tmp_path / "my slides", "here.tif", "more/b.svs")
    _, notes = collected(folder)
    assert f"'{folder}/**/*.tif'" in notes[0]


def test_folder_of_an_mrxs_slide_belongs_to_it(tmp_path: Path) -> None:
    touch(tmp_path, "s.mrxs", "s/Slidedat.ini")
    assert collected(tmp_path)[1] == []


def test_hidden_files_are_neither_slides_nor_failures(tmp_path: Path) -> None:
    touch(tmp_path, "s1.tif", "._s1.tif", ".DS_Store", ".cache/x.svs")
    assert collected(tmp_path)[0].keys() == {"s1"}
    assert collected(tmp_path / "*")[0].keys() == {"s1"}
    assert collected(tmp_path)[1] == []


def test_folders_that_a_glob_matches_are_searched_as_those_that_a_shell_names(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.svs", "one/x.txt", "two/b.svs", "empty/notes.txt")
    folders = sorted(tmp_path.iterdir())
    by_glob, by_name = collected(tmp_path / "*"), collected(*folders)
    assert by_glob == by_name
    assert list(by_glob[0]) == [str(tmp_path / "empty"), "a", "b"]
    assert "a folder must hold slides" in str(by_glob[0][str(tmp_path / "empty")].problem)


def test_glob_goes_below_folders_that_it_matches_by_stars(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "one/b.svs", "one/two/c.svs", "dir.svs/d.svs")
    assert collected(tmp_path / "**" / "*.svs")[0].keys() == {"a", "b", "c", "d"}


@pytest.mark.parametrize("bad", ["gone-*.svs", "empty", "notes.txt", "table.xlsx", "nowhere.csv"])
def test_source_without_slides_fails_alone_and_is_a_failing_job_among_others(tmp_path: Path, bad: str) -> None:
    touch(tmp_path, "a.svs", "empty/.keep", "notes.txt")
    (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04...")
    with pytest.raises(ManifestError) as alone:
        collect_jobs([tmp_path / bad])
    jobs, _ = collected(tmp_path / bad, tmp_path / "a.svs")
    assert jobs[str(tmp_path / bad)].problem == str(alone.value)
    assert jobs["a"].problem is None


def test_folder_that_cannot_be_read_fails_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.svs", "closed/b.svs")
    scan = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(folder_search.os, "scandir", refuse)
    jobs, _ = collected(tmp_path / "closed", tmp_path)
    assert "must be readable" in str(jobs[str(tmp_path / "closed")].problem)
    assert jobs["a"].problem is None


@pytest.mark.parametrize("pattern", ["*/*.svs", "**/*.svs", "*/*/*.svs", "[ab]/../*/x/*.svs"])
def test_folder_in_which_a_glob_may_not_look_is_a_failing_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    touch(tmp_path, "a/x/one.svs", "a/two.svs", "b/x/three.svs", "b/four.svs")
    closed = tmp_path / "b"
    scan = os.scandir

    def refuse(path: object) -> object:
        if os.path.realpath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode, **more: os.path.realpath(path) != str(closed))
    jobs, _ = collected(tmp_path / pattern)
    failed = {os.path.realpath(slide_id): job.problem for slide_id, job in jobs.items() if job.problem}
    assert failed.keys() == {str(closed)}
    assert "must be readable" in str(failed[str(closed)])
    assert jobs.keys() & {"one", "two"}


def test_name_that_is_not_utf8_is_a_slide_with_an_id_that_is_text(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"Gef\xe4\xdf.tif")).touch()
    (job,) = collect_jobs([tmp_path])
    assert (job.slide_id, job.problem) == ("Gef%E4%DF", None)
    assert os.fsencode(job.path).endswith(b"/Gef\xe4\xdf.tif")


def test_long_lists_of_files_take_time_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"s{number}.svs" for number in range(300)))
    resolved: list[object] = []
    monkeypatch.setattr(os.path, "realpath", lambda path: resolved.append(path) or path)
    assert len(collect_jobs([tmp_path, *tmp_path.iterdir()])) == 300
    assert not resolved


# DICOM


def element(tag: int, kind: bytes, value: bytes | None) -> bytes:
    """An element of explicit little-endian DICOM; None for a value that ends with a delimiter of its own."""
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind
    long = kind in (b"SQ", b"OB", b"UN", b"OW")
    if value is None:
        return head + struct.pack("<2xI", 0xFFFFFFFF)
    value += b" " * (len(value) % 2)
    return head + struct.pack("<2xI" if long else "<H", len(value)) + value


def item(*elements: bytes, told: bool) -> bytes:
    body = b"".join(elements)
    start = struct.pack("<HHI", 0xFFFE, 0xE000, len(body) if told else 0xFFFFFFFF)
    return start + body + (b"" if told else struct.pack("<HHI", 0xFFFE, 0xE00D, 0))


def write_dicom(path: Path, uid: str, columns: int, flavour: str = "VOLUME") -> Path:
    """What precedes the pixels of a DICOM slide's file, with nested sequences of either length and a long element."""
    inner = element(0x0008114A, b"SQ", None) + item(element(0x00080008, b"CS", b"NO\\NO\\NO"), told=False)
    inner += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        bytes(128)
        + b"DICM"
        + element(0x00020010, b"UI", b"1.2.840.10008.1.2.4.50")
        + element(0x00080008, b"CS", f"DERIVED\\PRIMARY\\{flavour}\\NONE".encode())
        + element(0x00081115, b"SQ", None)
        + item(inner, told=False)
        + item(inner, told=True)
        + end
        + element(0x00091010, b"OB", bytes(5000))
        + element(0x0020000E, b"UI", uid.encode() + b"\0" * (len(uid) % 2))
        + element(0x00400560, b"SQ", item(inner, told=True))
        + element(0x00480006, b"UL", struct.pack("<I", columns))
        + element(0x7FE00010, b"OB", None)
    )
    return path


def test_dicom_file_says_its_series_and_its_size(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", "1.2.3", 46000)
    assert read_series_file(path) == SeriesFile("1.2.3", 46000, is_level=True)
    assert read_series_file(write_dicom(tmp_path / "b.dcm", "1.22.3", 512, "LABEL")) == SeriesFile("1.22.3", 512, False)


@pytest.mark.parametrize("spoil", [lambda data: data[:150], lambda data: b"II*\0" + data, lambda data: b"", len])
def test_file_that_is_not_dicom_has_no_series(tmp_path: Path, spoil: Callable[[bytes], object]) -> None:
    path = write_dicom(tmp_path / "a.dcm", "1.2.3", 46000)
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt if isinstance(spoilt, bytes) else bytes(range(256)) * 20)
    assert read_series_file(path) is None
    assert read_series_file(tmp_path / "nowhere.dcm") is None


@pytest.mark.parametrize("source", ["CMU-1", "CMU-1/*.dcm"])
def test_folder_of_one_series_is_one_slide_of_the_folders_name(tmp_path: Path, source: str) -> None:
    for number, (columns, flavour) in enumerate(
        [(500, "VOLUME"), (90000, "LABEL"), (46000, "VOLUME"), (11500, "VOLUME")]
    ):
        write_dicom(tmp_path / "CMU-1" / f"DCM_{number}.dcm", "1.2.3", columns, flavour)
    (job,) = collect_jobs([tmp_path / source])
    assert (job.slide_id, job.path.name, job.problem) == ("CMU-1", "DCM_2.dcm", None)


def test_several_series_in_one_folder_have_the_names_of_their_largest_levels(tmp_path: Path) -> None:
    for name, uid, columns in (("a0", "1.1", 4), ("a1", "1.1", 16), ("b0", "1.2", 64), ("b1", "1.2", 16)):
        write_dicom(tmp_path / f"{name}.dcm", uid, columns)
    touch(tmp_path, "broken.dcm", "s.svs")
    assert collected(tmp_path)[0].keys() == {"a1", "b0", "broken", "s"}


def test_one_dicom_file_that_is_named_is_taken_as_it_is(tmp_path: Path) -> None:
    for number in range(2):
        write_dicom(tmp_path / f"d{number}.dcm", "1.2.3", 100 * (number + 1))
    assert collected(tmp_path / "d0.dcm")[0].keys() == {"d0"}


@pytest.mark.parametrize("name", ["DICOM JPEG", "DICOM JPEG, sparse", "DICOM uncompressed"])
def test_series_that_pydicom_wrote_is_one_slide_that_openslide_opens_whole(tmp_path: Path, name: str) -> None:
    sources, pydicom = pytest.importorskip("fuzz_sources"), pytest.importorskip("pydicom")
    rgb, _ = sources.draw_tissue(*sources.SIZE)
    (tmp_path / "case").mkdir()
    files = sources.DRAWINGS[name](tmp_path / "case", rgb)
    assert len(files) > 2
    for path in files:
        data = pydicom.dcmread(path)
        found = read_series_file(path)
        assert found == SeriesFile(
            data.SeriesInstanceUID, data.TotalPixelMatrixColumns, is_level=data.ImageType[2] == "VOLUME"
        )
    (job,) = collect_jobs([tmp_path / "case"])
    assert (job.slide_id, job.problem) == ("case", None)
    assert pydicom.dcmread(job.path).TotalPixelMatrixColumns == sources.SIZE[0]
    with openslide.OpenSlide(job.path) as slide:
        assert slide.dimensions == sources.SIZE
        assert slide.level_count == len(files) - len(slide.associated_images)
