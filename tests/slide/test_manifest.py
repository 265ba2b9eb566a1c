from __future__ import annotations

from pathlib import Path

import pytest

from maskattn.errors import ManifestError
from maskattn.slide.manifest import collect_jobs, read_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.svs", "a.tiff", "notes.txt", "mask.png"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, *lines: str) -> Path:
    path = folder / "slides.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_paths_folders_and_globs_become_jobs_once_each(folder: Path) -> None:
    jobs = collect_jobs([folder / "b.svs", folder, str(folder / "*.tif*")])
    assert [job.slide_id for job in jobs] == ["b", "a"]
    assert all(job.problem is None for job in jobs)


def test_manifest_paths_start_at_its_own_folder(folder: Path) -> None:
    path = write(folder, "slide_id,slide_path,mask_path,spacing_um", "one,a.tiff,mask.png,0.25", "", "two,b.svs,,")
    one, two = collect_jobs([path])
    assert (one.path, one.mask_path, one.spacing_um) == (folder / "a.tiff", folder / "mask.png", 0.25)
    assert (two.path, two.mask_path, two.spacing_um, two.problem) == (folder / "b.svs", None, None, None)


def test_manifest_of_a_spreadsheet_program_is_read(folder: Path) -> None:
    path = folder / "slides.csv"
    path.write_bytes("\ufeffslide_id, slide_path\r\none, a.tiff\r\n".encode())
    assert [(job.slide_id, job.path) for job in read_manifest(path)] == [("one", folder / "a.tiff")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("bad,nowhere.svs,,", "does not exist"),
        ("bad,,,", "slide_path"),
        (",b.svs,,", "slide_id"),
        ("bad,b.svs,nomask.png,", "nomask.png"),
        ("bad,b.svs,,half", "'half'"),
        ("bad,b.svs,,-1", "'-1'"),
        ("bad,b.svs,,nan", "'nan'"),
        ("bad,b.svs,,0.5,more", "more in line 3"),
        ("../bad,b.svs,,", "'../bad'"),
        (".bad,b.svs,,", "'.bad'"),
    ],
)
def test_bad_row_is_a_failing_job_and_the_others_go_on(folder: Path, row: str, problem: str) -> None:
    path = write(folder, "slide_id,slide_path,mask_path,spacing_um", "one,a.tiff,,", row, "three,a.tiff,,")
    one, bad, three = read_manifest(path)
    assert one.problem is None
    assert three.problem is None
    assert problem in str(bad.problem)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("slide_id,slide_path,label", "one,a.tiff,x"), "unknown: label"),
        (("slide_id,path", "one,a.tiff"), "missing: slide_path"),
        (("slide_id,slide_path,slide_path", "one,a.tiff,b.svs"), "each once"),
        (("slide_id,slide_path",), "at least one row"),
        (("",), "no header"),
        (("slide_id,slide_path", "one,a.tiff", "one,b.svs"), "'one' twice"),
    ],
)
def test_malformed_manifest_is_an_error_that_names_the_fault(
    folder: Path, lines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(folder, *lines))


def test_manifest_that_is_no_text_is_an_error(folder: Path) -> None:
    (folder / "slides.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ManifestError, match="readable CSV"):
        collect_jobs([folder / "slides.csv"])


def test_two_slides_of_one_name_are_an_error_that_names_both(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "b.svs").touch()
    with pytest.raises(ManifestError, match=r"'b' for both .*b.svs and .*more"):
        collect_jobs([folder / "b.svs", folder / "more" / "b.svs"])


def test_missing_path_is_a_failing_job(tmp_path: Path) -> None:
    (job,) = collect_jobs([tmp_path / "gone.svs"])
    assert "does not exist" in str(job.problem)


@pytest.mark.parametrize("source", ["*.svs", ".", "absent.csv"])
def test_source_without_slides_is_an_error(tmp_path: Path, source: str) -> None:
    with pytest.raises(ManifestError):
        collect_jobs([tmp_path / source])


def test_nothing_asked_is_an_error() -> None:
    with pytest.raises(ManifestError, match="at least one slide"):
        collect_jobs([])
