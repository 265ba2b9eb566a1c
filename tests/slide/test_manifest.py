from __future__ import annotations

import codecs
import contextlib
import csv
import io
import os
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskattn.errors import ManifestError
from maskattn.slide.manifest import SlideJob, collect_jobs, read_manifest
from maskattn.slide.names import as_text


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
        (("slide_id,path", "one,a.tiff"), "missing: slide_path; unknown: path"),
        (("slide_id,slide_pth", "one,a.tiff"), "missing: slide_path; unknown: slide_pth"),
        (("slide_ID2,slide_path", "one,a.tiff"), "missing: slide_id; unknown: slide_ID2"),
        (("slide_path", "a.tiff"), "missing: slide_id"),
        (("PATIENT,FILENAMES", "p,a.h5"), "missing: slide_id, slide_path; unknown: FILENAMES, PATIENT"),
        (("case_id,label", "c,1"), "missing: slide_id, slide_path; unknown: case_id, label"),
        (("slide_id,slide_path,mpp,spacing_um", "one,a.tiff,1,1"), "more than once: spacing_um"),
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04\x14\0", "got a workbook in"),
        (b"\xd0\xcf\x11\xe0\xa1", "got a workbook in"),
        (b"II*\0\x08\0", "got an image in"),
        (b"\xff\xfe\x00", "starts as UTF-16-LE does"),
        (b"\xff\xfe\x00\xd8a\x00", "starts as UTF-16-LE does"),
    ],
)
def test_manifest_that_is_not_text_is_an_error_that_says_how_to_save_it(
    folder: Path, content: bytes, words: str
) -> None:
    (folder / "slides.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=f"readable CSV text, .*{words}.*save the table as CSV UTF-8"):
        collect_jobs([folder / "slides.csv"])


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\xef\xbb\xbf", b"sep=;\n", b",,,\n", b"\xff\xfe", bytes(range(1, 256))]
)
def test_manifest_without_a_header_is_an_error(folder: Path, content: bytes) -> None:
    (folder / "slides.csv").write_bytes(content)
    with pytest.raises(ManifestError, match="must have the columns"):
        read_manifest(folder / "slides.csv")


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


def test_a_request_without_slides_is_an_error() -> None:
    with pytest.raises(ManifestError, match="at least one slide"):
        collect_jobs([])


# Tables as programs save them

TABLE = [
    ["slide_id", "slide_path", "mask_path", "spacing_um"],
    ["Gefäß", "b.svs", "", "0.25"],
    ["a, the first; really", "a.tiff", "mask.png", ""],
]


def written(rows: list[list[str]], delimiter: str = ",", end: str = "\n") -> str:
    """The rows as a spreadsheet program writes them: quoted where they must be."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return text.getvalue()


def summed_up(jobs: list[SlideJob]) -> list[tuple[str, str, str | None, float | None, str | None]]:
    return [
        (job.slide_id, job.path.name, job.mask_path and job.mask_path.name, job.spacing_um, job.problem) for job in jobs
    ]


RIGHT = [("Gefäß", "b.svs", None, 0.25, None), ("a, the first; really", "a.tiff", "mask.png", None, None)]


@pytest.mark.parametrize("name", ["slides.csv", "slides.tsv", "slides.txt", "SLIDES.CSV"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "mark and utf-16-be"]
)
def test_table_is_read_as_any_program_saves_it(
    folder: Path, encoding: str, delimiter: str, end: str, name: str
) -> None:
    text = written(TABLE, delimiter, end)
    data = text.encode(encoding) if " " not in encoding else codecs.BOM_UTF16_BE + text.encode("utf-16-be")
    (folder / name).write_bytes(data)
    assert summed_up(collect_jobs([folder / name])) == RIGHT


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f"sep=;\n{text}",
        lambda text: f'"SEP=;"\r\n\r\n{text}',
        lambda text: f"\n ;;;\n\t\n{text}",
        lambda text: text.replace("\n", ";;;\n"),
        lambda text: text.replace("\n", "; ;\u00a0\n"),
        lambda text: text.replace(";", "\u00a0;\u200b \ufeff").replace("first\u00a0;\u200b \ufeff", "first;"),
        lambda text: text.replace("0.25", "0,25"),
        lambda text: text.rstrip("\n"),
        lambda text: text.replace(
            "slide_id;slide_path;mask_path;spacing_um", "Slide ID;SLIDE-PATH; mask path;Spacing (µm)"
        ).replace(" (µm)", "_µm"),
        lambda text: text.replace("spacing_um", "spacing_μm"),
        lambda text: text.replace("slide_id", "sample_id").replace("slide_path", "image_path"),
        lambda text: text.replace("spacing_um", "spacing_at_level_0"),
        lambda text: text.replace("spacing_um", "MPP"),
        lambda text: text.replace(";", ";;", 1).replace("Gefäß;", "Gefäß;;").replace('";', '";;'),
        lambda text: text.replace("b.svs", "./more\\..\\b.svs"),
    ],
)
def test_what_spreadsheets_add_and_other_tools_call_it_does_not_matter(
    folder: Path, change: Callable[[str], str]
) -> None:
    (folder / "more").mkdir()
    (folder / "slides.csv").write_text(change(written(TABLE, ";")), encoding="utf-8")
    assert summed_up(read_manifest(folder / "slides.csv")) == RIGHT


def test_table_of_trident_names_slides_by_their_files(folder: Path) -> None:
    jobs = read_manifest(write(folder, "wsi,mpp", "a.tiff,0.5", "b.svs,"))
    assert summed_up(jobs) == [("a", "a.tiff", None, 0.5, None), ("b", "b.svs", None, None, None)]


def test_columns_that_are_not_ours_are_kept_and_those_without_a_name_skipped(folder: Path) -> None:
    notes: list[str] = []
    path = write(folder, ",case_id,slide_id,label,slide_path,note,", '0,c,one,1,a.tiff,"two\nlines, ""all""",')
    (job,) = read_manifest(path, notes.append)
    assert (job.slide_id, job.path, job.problem) == ("one", folder / "a.tiff", None)
    assert job.carried == (("case_id", "c"), ("label", "1"), ("note", 'two\nlines, "all"'))
    assert notes == [
        f"in {path}, carried to the summary the columns case_id, label, note",
        f"in {path}, passed over 1 column without a name",
    ]


@pytest.mark.parametrize(
    "name",
    ["spacing", "spacing_mu", "spacing_px", "mpp_x", "microns_per_pixel", "mask", "masks", "maskpath2", "spacing_umm"],
)
def test_column_that_may_be_a_misspelt_one_of_ours_is_an_error(folder: Path, name: str) -> None:
    with pytest.raises(ManifestError, match=f"unknown: {name}; give each the name of what it is, or drop it"):
        read_manifest(write(folder, f"slide_id,slide_path,{name}", "one,a.tiff,x"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("bad,b.svs,,1.000,5,", "more in line 3"),
        ("bad,b.svs,,,more", "more in line 3"),
        ("bad,b\0.svs,,", "nul"),
        (f"bad,{'x' * 300}.svs,,", "too long"),
        (f"bad,{'x/' * 30_000}.svs,,", "too long"),
        (f"bad,{'x/' * 100_000}.svs,,", "field larger than field limit"),
        ('bad,"b.svs,,', "close the quotes"),
        ('"bad,b.svs,,', "close the quotes"),
        ("bad,more,,", "is a folder"),
        ("bad,b.svs/c.svs,,", "passes through a file"),
        ("bad,C:\\slides\\b.svs,,", "Windows path"),
        ("summary.csv,b.svs,,", "name of the run's table"),
        ("bad\x1b,b.svs,,", "control"),
        ("bad,b.svs,more,", "a mask must be a file"),
        ("bad,b.svs,,0;5", "'0;5'"),
        ("bad,b.svs,,inf", "'inf'"),
        ("bad,gone.svs,,", "a link to /not/there"),
    ],
)
def test_strange_row_fails_alone(folder: Path, row: str, words: str) -> None:
    (folder / "more").mkdir()
    (folder / "gone.svs").symlink_to("/not/there")
    path = write(
        folder, "slide_id,slide_path,mask_path,spacing_um,", "one,a.tiff", row, '"three",a.tiff,,', "four,b.svs"
    )
    one, bad, three, four = read_manifest(path)
    assert [job.problem for job in (one, three, four)] == [None] * 3
    assert words in str(bad.problem).lower() if words == "nul" else words in str(bad.problem)
    assert str(bad.problem).isprintable()
    assert len(str(bad.problem)) < 700
    assert bad.slide_id.isprintable()


def test_two_rows_with_an_open_quote_swallow_none_between_them(folder: Path) -> None:
    lines = ["slide_id,slide_path", 'a,"a.tiff', "b,b.svs", 'c,"b.svs', "d,a.tiff", 'inch 5",a.tiff']
    assert [(job.slide_id, job.problem is None) for job in read_manifest(write(folder, *lines))] == [
        ("line-2", False),
        ("b", True),
        ("line-4", False),
        ("d", True),
        ('inch 5"', True),
    ]


def test_one_line_in_another_code_page_does_not_garble_the_others(folder: Path) -> None:
    (folder / "Gefäß.svs").touch()
    raw = folder / os.fsdecode("Bär.svs".encode("cp1252"))
    raw.touch()
    (folder / "slides.csv").write_bytes("slide_id,slide_path\nGefäß,Gefäß.svs\n".encode() + b"B\xe4r,B\xe4r.svs\n")
    assert [(job.slide_id, job.path, job.problem) for job in read_manifest(folder / "slides.csv")] == [
        ("Gefäß", folder / "Gefäß.svs", None),
        ("Bär", raw, None),
    ]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_whose_accents_the_disk_encodes_differently_are_found(folder: Path, forms: tuple[str, str]) -> None:
    in_table, on_disk = (unicodedata.normalize(form, "Gefäß é.svs") for form in forms)
    (folder / on_disk).touch()
    (job,) = read_manifest(write(folder, "slide_id,slide_path", f"one,{in_table}"))
    assert (job.problem, job.path.name) == (None, on_disk)


def test_backslash_in_a_file_name_is_not_a_separator(folder: Path) -> None:
    (folder / "more").mkdir()
    for path in (folder / "more" / "c.svs", folder / "more\\c.svs"):
        path.touch()
    (job,) = read_manifest(write(folder, "slide_id,slide_path", "one,more\\c.svs"))
    assert job.path == folder / "more\\c.svs"


def test_manifest_option_takes_any_file_extension_and_refuses_other_files(folder: Path) -> None:
    path = write(folder, "slide_id,slide_path", "one,a.tiff").rename(folder / "list.of.slides")
    assert [job.slide_id for job in collect_jobs([folder / "b.svs"], manifest=path)] == ["b", "one"]
    with pytest.raises(ManifestError, match="must have the columns"):
        collect_jobs([folder / "b.svs"], manifest=folder / "notes.txt")


def test_what_two_sources_say_of_one_slide_is_joined(folder: Path) -> None:
    path = write(folder, "slide_id,slide_path,mask_path,spacing_um", "b,b.svs,mask.png,0.25")
    (job,) = collect_jobs([folder / "b.svs", path])
    assert (job.mask_path, job.spacing_um) == (folder / "mask.png", 0.25)


def test_what_two_sources_say_of_one_slide_must_agree(folder: Path) -> None:
    tables = [folder / "one.csv", folder / "two.csv"]
    for path, spacing_um in zip(tables, ("0.25", "0.5"), strict=True):
        path.write_text(f"slide_id,slide_path,spacing_um\nb,b.svs,{spacing_um}\n")
    with pytest.raises(ManifestError, match=r"one spacing_um, got 0\.25 and 0\.5 for 'b'"):
        collect_jobs(tables)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_give_at_worst_a_manifest_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.csv"
        path.write_bytes(b"slide_id,slide_path\n" * (len(data) % 2) + data)
        with contextlib.suppress(ManifestError):
            for job in read_manifest(path):
                assert job.problem is None or as_text(job.problem) == job.problem


def test_long_table_takes_time_in_proportion(folder: Path) -> None:
    rows = [f's{number},a.tiff,"a note, of\nlines"' for number in range(3000)]
    start = time.perf_counter()
    jobs = collect_jobs([write(folder, "slide_id,slide_path,note", *rows)])
    assert len(jobs) == 3000
    assert time.perf_counter() - start < 10  # it takes a tenth of a second; with the square of the rows, minutes
