"""The table of a run, ``summary.csv``, is complete at any moment, at a cost that grows only with its rows."""

from __future__ import annotations

import csv
import resource
from pathlib import Path

import pytest
from small_slides import small_model

from maskattn.errors import OutputError
from maskattn.slide import summary
from maskattn.slide.manifest import SlideJob
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.summary import append_row, read_summary, tidy_summary, write_summary

COLUMNS = ["slide_id", "status", "reason", "prediction", "score_a", "score_b", "score_c", "model", "seconds"]


def row(slide_id: str, status: str = "failed", **more: str) -> dict[str, str]:
    return {"slide_id": slide_id, "status": status, "reason": f"why {slide_id}", "seconds": "0.10", **more}


def statuses(path: Path) -> dict[str, str]:
    return {slide_id: found["status"] for slide_id, found in read_summary(path).items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "summary.csv"


@pytest.fixture
def rewrites(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows at each writing of the complete table."""
    sizes: list[int] = []
    write = summary.write_summary

    def counted(path: Path, rows: object) -> None:
        rows = list(rows)
        sizes.append(len(rows))
        write(path, rows)

    monkeypatch.setattr(summary, "write_summary", counted)
    return sizes


def test_every_class_that_occurs_has_a_column(path: Path) -> None:
    rows = [
        row("one", "ok", score_a="0.75", score_b="0.25", prediction="a", model="m"),
        row("two", reason='it is "broken", so'),
        row("three", "skipped", score_c="1.0"),
    ]
    write_summary(path, rows)
    found = read_summary(path)
    assert list(found) == ["one", "two", "three"]
    assert list(found["one"]) == COLUMNS
    assert (found["one"]["score_a"], found["one"]["score_c"]) == ("0.75", "")
    assert found["two"]["reason"] == 'it is "broken", so'
    before = path.read_bytes()
    write_summary(path, found.values())
    assert path.read_bytes() == before


def test_appended_rows_give_the_same_file_as_a_table_written_at_once(path: Path, tmp_path: Path) -> None:
    rows = [row("x"), row("y", "ok", score_a="1", model="m"), row("z", "ok", score_b="1"), row('ä, "q"')]
    for one in rows:
        append_row(path, one)
    write_summary(tmp_path / "whole.csv", rows)
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_table_is_rewritten_for_new_columns_only(path: Path, rewrites: list[int]) -> None:
    for number in range(50):
        append_row(path, row(f"f{number}"))
    append_row(path, row("ok", "ok", score_a="1"))
    for number in range(50):
        append_row(path, row(f"g{number}", "ok", score_a="0"))
    assert rewrites == [1, 51]
    assert len(read_summary(path)) == 101


def test_last_row_of_a_slide_counts_and_keeps_its_position(path: Path, rewrites: list[int]) -> None:
    for slide_id in ("a", "b", "c"):
        append_row(path, row(slide_id))
    append_row(path, row("b", "ok"))
    assert statuses(path) == {"a": "failed", "b": "ok", "c": "failed"}
    tidy_summary(path)
    with path.open(newline="") as file:
        assert [(found["slide_id"], found["status"]) for found in csv.DictReader(file)] == [
            ("a", "failed"),
            ("b", "ok"),
            ("c", "failed"),
        ]
    tidy_summary(path)
    assert rewrites == [1, 3]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_row_that_a_killed_run_tore_is_dropped_and_the_next_one_is_complete(path: Path, cut: int) -> None:
    append_row(path, row("whole"))
    append_row(path, row("törn", reason='so "said", wörds'))
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines[-1]) > cut
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: -cut - len(",,,0.10\n")])
    assert statuses(path) == {"whole": "failed"}
    append_row(path, row("next"))
    assert statuses(path) == {"whole": "failed", "next": "failed"}
    assert len(path.read_text().splitlines()) == 3


def test_disk_that_fills_in_the_middle_of_a_row_leaves_the_rows_before(path: Path) -> None:
    append_row(path, row("a"))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 7, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_row(path, row("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


@pytest.mark.parametrize("saved", ["\ufeff{}", "{}\r\n", "{}"])
def test_table_that_a_spreadsheet_program_saved_is_continued(path: Path, saved: str) -> None:
    text = "slide_id,status,reason,prediction,model,seconds,mine\na,ok,,x,m,1,keep it"
    path.write_text(saved.format(text), encoding="utf-8", newline="")
    append_row(path, row("b"))
    found = read_summary(path)
    assert {slide_id: cells["mine"] for slide_id, cells in found.items()} == {"a": "keep it", "b": ""}


def test_characters_that_break_lines_or_have_no_encoding_are_escaped(path: Path) -> None:
    append_row(path, row("a\nb\0c", reason="Gef\udce4\x1b[31m µm"))
    assert len(path.read_bytes().splitlines()) == 2
    assert read_summary(path)["a%0Ab%00c"]["reason"] == "Gef%E4%1B[31m µm"


def test_table_that_may_not_be_appended_to_is_rewritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_row(path, row("a"))
    opened = Path.open

    def read_only(self: Path, mode: str = "r", *arguments: object, **named: object) -> object:
        if mode == "r+b":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", read_only)
    append_row(path, row("b"))
    assert list(read_summary(path)) == ["a", "b"]


def test_absent_summary_is_empty(path: Path) -> None:
    assert read_summary(path) == {}


@pytest.mark.parametrize("content", [b"", b"name,age\nx,1\n", b"\xff\xfe\0\1", b"slide_id;status;reason\na;ok;\n"])
def test_strange_file_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for call in (lambda: read_summary(path), lambda: append_row(path, row("a")), lambda: tidy_summary(path)):
        with pytest.raises(ValueError, match="move that file away"):
            call()
    assert path.read_bytes() == content


def failing(*names: str) -> list[SlideJob]:
    return [SlideJob(name, Path(f"{name}.svs"), problem="there is no such file") for name in names]


def test_folder_of_the_summarys_name_is_an_error_before_the_first_slide(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OutputError, match=r"summary must be a readable and writable file, .* Is a directory"):
        run_slides(failing("a"), small_model(), RunSettings(path.parent))


def test_run_again_leaves_one_row_of_each_slide_and_rewrites_once(path: Path, rewrites: list[int]) -> None:
    model, names = small_model(), [f"s{number}" for number in range(300)]
    for _ in range(2):
        run_slides(failing(*names), model, RunSettings(path.parent))
    assert rewrites == [1, 300]
    assert len(path.read_text().splitlines()) == 301


def test_run_that_is_interrupted_leaves_one_row_of_each_slide(path: Path) -> None:
    class Interrupt:
        def slide_started(self, job: SlideJob) -> None:
            if job.slide_id == "c":
                raise KeyboardInterrupt

        def tiles_done(self, done: int, total: int) -> None: ...

        def slide_ended(self, outcome: object) -> None: ...

    model = small_model()
    run_slides(failing("a", "b", "c"), model, RunSettings(path.parent))
    with pytest.raises(KeyboardInterrupt):
        run_slides(failing("b", "c"), model, RunSettings(path.parent), Interrupt())
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["slide_id", "a", "b", "c"]
