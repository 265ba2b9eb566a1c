"""A slide's folder of outputs: anything else at its path fails only that slide, and is never damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_slides import small_model

from maskattn.errors import SlideError
from maskattn.slide import output_folder
from maskattn.slide.manifest import SlideJob
from maskattn.slide.output_folder import are_one_name, clear_leftovers, find_finished, slide_folder
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.run import run_slides


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def broken_link(out: Path) -> None:
    (out / "a").symlink_to("/not/mounted/a")


def loop(out: Path) -> None:
    (out / "a").symlink_to("a")


def file(out: Path) -> None:
    (out / "a").write_text("mine")


def notes_in_it(out: Path) -> None:
    (out / "a").mkdir()
    (out / "a" / ".notes").write_text("mine")


def bytes_in_it(out: Path) -> None:
    (out / "a").mkdir()
    (out / "a" / os.fsdecode(b"Gef\xe4\xdf.txt")).write_text("mine")


def folder_for_prediction(out: Path) -> None:
    (out / "a" / "prediction.json").mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (broken_link, "got the broken link"),
        (loop, "got the broken link"),
        (file, "got the file"),
        (notes_in_it, "got '.notes' in"),
        (bytes_in_it, "got 'Gef%E4%DF.txt' in"),
        (folder_for_prediction, "must be readable"),
    ],
)
def test_foreign_files_fail_that_slide_alone_and_stay(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(SlideError, match=f"a slide's output.*{words}.*move it away"):
        find_finished(tmp_path, "a")
    jobs = [SlideJob("a", tmp_path / "a.svs"), SlideJob("b", tmp_path / "b.svs")]
    a, b = run_slides(jobs, small_model(), RunSettings(tmp_path, overwrite=True))
    assert words in a.reason
    assert "b.svs" in b.reason
    (tmp_path / "summary.csv").unlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_folder_that_cannot_be_read_fails_that_slide_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(output_folder.os, "listdir", refuse)
    with pytest.raises(SlideError, match=r"must be readable, got .*: Permission denied"):
        find_finished(tmp_path, "a")


@pytest.mark.parametrize("litter", [".DS_Store", "._prediction.json", "Thumbs.db", "desktop.ini", ".nfs00000001"])
def test_litter_of_the_system_is_not_a_foreign_file(tmp_path: Path, litter: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / litter).touch()
    assert find_finished(tmp_path, "a") is None


@pytest.mark.parametrize("leftover", [".a.partial", ".a.old"])
@pytest.mark.parametrize("kind", ["folder", "file", "link to a folder", "broken link"])
def test_leftover_of_any_kind_is_cleared_and_what_a_link_leads_to_stays(
    tmp_path: Path, leftover: str, kind: str
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "a").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "work.txt").touch()
    if kind == "folder":
        (out / leftover).mkdir()
        (out / leftover / "features.h5").touch()
    elif kind == "file":
        (out / leftover).touch()
    else:
        (out / leftover).symlink_to(elsewhere if kind == "link to a folder" else "/not/there")
    clear_leftovers(out, "a")
    assert names(out) == {"a"}
    assert names(elsewhere) == {"work.txt"}


def test_outputs_that_a_link_leads_to_are_replaced_by_the_new_ones_and_stay(tmp_path: Path) -> None:
    out, disk = tmp_path / "out", tmp_path / "disk"
    disk.mkdir()
    out.mkdir()
    (disk / "prediction.json").write_text("old")
    (out / "a").symlink_to(disk)
    for content in ("new", "newer"):
        with slide_folder(out, "a") as folder:
            (folder / "prediction.json").write_text(content)
        assert names(out) == {"a"}
        assert (out / "a" / "prediction.json").read_text() == content
    assert (disk / "prediction.json").read_text() == "old"


@pytest.fixture
def blind_to_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that finds a name by any case, as those of macOS and Windows do."""

    def is_there(path: Path) -> bool:
        return path.name.casefold() in {name.casefold() for name in names(path.parent)}

    monkeypatch.setattr(output_folder, "is_there", is_there)


def test_file_system_is_asked_whether_two_ids_are_one_name(tmp_path: Path) -> None:
    assert are_one_name(tmp_path, "case", "case")
    assert not are_one_name(tmp_path, "case", "other")
    assert not are_one_name(tmp_path, "x" * 300, "other")
    assert not names(tmp_path)


def test_ids_that_differ_in_case_alone_do_not_overwrite_each_other_where_case_does_not_count(
    tmp_path: Path, blind_to_case: None
) -> None:
    jobs = [SlideJob(name, tmp_path / f"{name}.svs") for name in ("case", "Case", "other")]
    first, second, third = run_slides(jobs, small_model(), RunSettings(tmp_path / "out"))
    assert "must differ from the others in more than case" in second.reason
    assert "case.svs" in first.reason
    assert "other.svs" in third.reason


def test_ids_that_differ_in_case_alone_are_two_slides_where_case_counts(tmp_path: Path) -> None:
    if (tmp_path / "A").mkdir() is None and (tmp_path / "a").exists():
        pytest.skip("this file system takes A for a")
    jobs = [SlideJob(name, tmp_path / f"{name}.svs") for name in ("case", "Case")]
    outcomes = run_slides(jobs, small_model(), RunSettings(tmp_path / "out"))
    assert [f"{outcome.slide_id}.svs" in outcome.reason for outcome in outcomes] == [True, True]


@pytest.mark.parametrize("slide_id", ["summary.csv", "../up", ".hidden", "x" * 201])
def test_id_that_cannot_name_a_folder_fails_that_slide_alone(tmp_path: Path, slide_id: str) -> None:
    jobs = [SlideJob(slide_id, tmp_path / "a.svs"), SlideJob("b", tmp_path / "b.svs")]
    a, b = run_slides(jobs, small_model(), RunSettings(tmp_path / "out"))
    assert "a slide_id must" in a.reason
    assert "b.svs" in b.reason
    assert names(tmp_path / "out") == {"summary.csv"}
