"""Whatever is found where a slide should be gets a reason in words, never an exception."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maskattn.slide import file_checks
from maskattn.slide.file_checks import is_folder, problem_of_file, same_file


def broken_link(folder: Path) -> Path:
    (folder / "gone.tif").symlink_to("/not/mounted/gone.tif")
    return folder / "gone.tif"


def loop_of_links(folder: Path) -> Path:
    (folder / "a.tif").symlink_to("b.tif")
    (folder / "b.tif").symlink_to("a.tif")
    return folder / "a.tif"


def file_in_the_way(folder: Path) -> Path:
    (folder / "x.svs").touch()
    return folder / "x.svs" / "y.svs"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.tif")
    return folder / "pipe.tif"


STRANGE: dict[str, Callable[[Path], Path]] = {
    "does not exist; check": lambda folder: folder / "nowhere.svs",
    "is a link to /not/mounted/gone.tif, which does not exist; mount": broken_link,
    "is a link that leads back to itself": loop_of_links,
    "passes through a file as if it were a folder": file_in_the_way,
    "is too long for this file system": lambda folder: folder / ("x" * 300 + ".tif"),
    "is too long for this file system (5": lambda folder: folder / "/".join(["y" * 100] * 50),
    "contains a null byte": lambda folder: folder / "a\0.tif",
    "is a folder": lambda folder: folder,
    "is a device, a pipe or a socket": pipe,
    "write the Windows path as this machine mounts it": lambda folder: folder / "D:\\slides\\a.svs",
    "the Windows path": lambda folder: folder / "\\\\server\\slides\\a.svs",
}


@pytest.mark.parametrize("words", STRANGE)
def test_strange_path_is_reported_with_its_cause(tmp_path: Path, words: str) -> None:
    problem = problem_of_file(STRANGE[words](tmp_path), "slide", "line 2 of m.csv")
    assert problem is not None
    assert words in problem
    assert problem.startswith("a slide must be a file, got ")
    assert " in line 2 of m.csv, which " in problem
    assert problem.isprintable()
    assert len(problem) < 700


@pytest.mark.parametrize("words", STRANGE)
def test_no_question_about_a_strange_path_is_an_exception(tmp_path: Path, words: str) -> None:
    path = STRANGE[words](tmp_path)
    assert is_folder(path) == (words == "is a folder")
    assert same_file(path, path)
    assert not same_file(path, tmp_path / "other.svs")


def test_file_and_link_to_a_file_have_no_problem(tmp_path: Path) -> None:
    (tmp_path / "a.svs").touch()
    (tmp_path / "link.svs").symlink_to("a.svs")
    assert problem_of_file(tmp_path / "a.svs", "slide") is None
    assert problem_of_file(tmp_path / "link.svs", "slide") is None
    assert same_file(tmp_path / "a.svs", tmp_path / "link.svs")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "may not search"), (errno.EIO, "cannot be reached (Input/output error)"), (errno.ESTALE, "Stale")],
)
def test_error_of_the_file_system_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(path: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(file_checks.os, "stat", refuse)
    assert words in str(problem_of_file(tmp_path / "a.svs", "slide"))
    assert not is_folder(tmp_path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may search, as pytest's own may not be."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="to give up rights, one must have them")
def test_file_that_another_user_may_not_read_is_reported(open_folder: Path) -> None:
    (open_folder / "closed").mkdir()
    (open_folder / "closed" / "a.svs").touch()
    (open_folder / "closed").chmod(0)
    (open_folder / "b.svs").touch(0)
    script = (
        "import os, sys; from pathlib import Path; from maskattn.slide.file_checks import problem_of_file\n"
        "os.seteuid(65534)\n"
        "for path in sys.argv[1:]: print(problem_of_file(Path(path), 'slide'))"
    )
    paths = [str(open_folder / "closed" / "a.svs"), str(open_folder / "b.svs")]
    run = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=300)
    closed, unreadable = run.stdout.splitlines()
    assert "is in a folder that this user may not search" in closed
    assert "this user may not read" in unreadable
