"""Other tools' tables: which column names the slides, where these lie, and what happens to the other columns."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from small_slides import small_model, write_slide

from maskattn.slide.manifest import collect_jobs, read_manifest
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tables, and slides in another."""
    for name in ("tables", "slides", "slides/sub"):
        (tmp_path / name).mkdir()
    for name in ("a.svs", "TCGA-1.b.tiff", "other.svs", "sub/c.ndpi"):
        (tmp_path / "slides" / name).touch()
    return tmp_path


def table(folder: Path, *lines: str) -> Path:
    path = folder / "tables" / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_clams_table_selects_slides_of_the_folder_that_is_named_beside_it(folder: Path) -> None:
    path = table(folder, "case_id,slide_id,label", "p1,a,tumour", "p2,TCGA-1.b.tiff,normal")
    for jobs in (collect_jobs([folder / "slides", path]), collect_jobs([folder / "slides"], manifest=path)):
        assert [(job.slide_id, job.path, job.problem, job.carried) for job in jobs] == [
            ("a", folder / "slides" / "a.svs", None, (("case_id", "p1"), ("label", "tumour"))),
            ("TCGA-1.b", folder / "slides" / "TCGA-1.b.tiff", None, (("case_id", "p2"), ("label", "normal"))),
        ]


def test_clams_table_finds_slides_of_its_own_folder(folder: Path) -> None:
    path = table(folder, "case_id,slide_id,label", "p1,a,1").rename(folder / "slides" / "list.csv")
    (job,) = collect_jobs([path])
    assert (job.path, job.problem) == (folder / "slides" / "a.svs", None)


def test_stamps_table_names_slides_by_their_files_of_features(folder: Path) -> None:
    path = table(folder, "PATIENT,FILENAME", "p1,a.h5", "p2,sub/c.h5", "p3,TCGA-1.b.h5")
    jobs = collect_jobs([path, folder / "slides"])
    assert [(job.slide_id, job.path.name, job.problem) for job in jobs] == [
        ("a", "a.svs", None),
        ("c", "c.ndpi", None),
        ("TCGA-1.b", "TCGA-1.b.tiff", None),
    ]
    assert jobs[1].path.parent == folder / "slides" / "sub"
    assert [dict(job.carried) for job in jobs] == [{"PATIENT": "p1"}, {"PATIENT": "p2"}, {"PATIENT": "p3"}]


def test_tridents_table_names_files_of_the_folder_that_is_named_beside_it(folder: Path) -> None:
    path = table(folder, "wsi,mpp", "a.svs,0.25", "sub/c.ndpi,0.5")
    jobs = collect_jobs([folder / "slides", path])
    assert [(job.slide_id, job.path, job.spacing_um) for job in jobs] == [
        ("a", folder / "slides" / "a.svs", 0.25),
        ("c", folder / "slides" / "sub" / "c.ndpi", 0.5),
    ]
    assert [job.problem for job in jobs] == [None, None]


def test_a_folder_beside_a_table_that_has_its_own_slides_stays_a_source(folder: Path) -> None:
    (folder / "tables" / "mine.svs").touch()
    path = table(folder, "wsi", "mine.svs")
    assert [job.slide_id for job in collect_jobs([folder / "slides", path])] == ["TCGA-1.b", "a", "other", "mine"]
    path = table(folder, "slide_id,slide_path", "mine,mine.svs")
    assert [job.slide_id for job in collect_jobs([path, folder / "slides"])] == ["mine", "TCGA-1.b", "a", "other"]


def test_slide2vecs_table_is_understood_with_its_patients(folder: Path) -> None:
    path = table(
        folder,
        "sample_id,image_path,mask_path,spacing_at_level_0,patient_id",
        "one,../slides/a.svs,,0.25,p1",
        "two,../slides/other.svs,../slides/a.svs,,0007",
    )
    one, two = collect_jobs([path])
    assert (one.slide_id, one.spacing_um, one.mask_path, one.problem) == ("one", 0.25, None, None)
    assert (two.mask_path, two.problem) == (folder / "tables" / "../slides/a.svs", None)
    assert [job.carried for job in (one, two)] == [(("patient_id", "p1"),), (("patient_id", "0007"),)]


def test_hs2ps_process_list_is_understood(folder: Path) -> None:
    path = table(
        folder,
        "sample_id,annotation,image_path,mask_path,requested_backend,backend,tiling_status,num_tiles,mask_preview_path",
        "one,tissue,../slides/a.svs,,auto,openslide,success,12,preview/one.png",
    )
    (job,) = collect_jobs([path])
    assert (job.slide_id, job.problem, dict(job.carried)["num_tiles"]) == ("one", None, "12")


def test_a_file_name_beside_a_path_is_one_more_column(folder: Path) -> None:
    path = table(folder, "slide_id,slide_path,filename,slide,label", "one,../slides/a.svs,a.h5,x,1")
    (job,) = read_manifest(path)
    assert (job.slide_id, job.problem) == ("one", None)
    assert job.carried == (("filename", "a.h5"), ("slide", "x"), ("label", "1"))


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (
            "case_id,slide_id,label",
            "p,gone,1",
            r"got no slide 'gone' \(line 3 of list.csv\) in .*tables, .*slides; name",
        ),
        ("case_id,slide_id,label", "p,twice,1", "got twice.svs and twice.tiff for 'twice' in line 3"),
        ("case_id,slide_id,label", "p,,1", "a row must have a slide_id, got none in line 3"),
        ("PATIENT,FILENAME", "p,", "a row must have a FILENAME, got none in line 3"),
        ("PATIENT,FILENAME", "p,a\0.h5", "got no slide"),
        ("wsi,mpp", "gone.svs,1", "does not exist"),
    ],
)
def test_a_row_whose_slide_is_not_found_fails_alone(folder: Path, header: str, row: str, message: str) -> None:
    for name in ("twice.svs", "twice.tiff"):
        (folder / "slides" / name).touch()
    first = {"case_id,slide_id,label": "p,a,1", "PATIENT,FILENAME": "p,a.h5", "wsi,mpp": "a.svs,1"}[header]
    found, failing = read_manifest(table(folder, header, first, row), folders=[folder / "slides"])
    assert found.problem is None
    assert re.search(message, str(failing.problem)), failing.problem


def test_columns_with_the_same_name_are_all_kept(folder: Path) -> None:
    (job,) = read_manifest(table(folder, "slide_id,slide_path,label,label", "one,../slides/a.svs,x,y"))
    assert job.carried == (("label", "x"), ("label_2", "y"))


def test_the_manifests_other_columns_are_copied_to_the_summary(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "disc.tiff")
    path = tmp_path / "list.csv"
    path.write_text(
        "case_id,slide_id,label,status,score_benign,PATIENT\n"
        f"p1,{slide.stem},tumour,waiting,9,0007\n"
        "p2,gone,normal,,,\n"
    )
    run_slides(collect_jobs([path]), small_model(), RunSettings(tmp_path / "out"))
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert [rows["disc"][name] for name in ("status", "case_id", "label", "PATIENT")] == ["ok", "p1", "tumour", "0007"]
    assert [rows["disc"][name] for name in ("manifest_status", "manifest_score_benign")] == ["waiting", "9"]
    assert float(rows["disc"]["score_benign"]) <= 1
    assert [rows["gone"][name] for name in ("status", "case_id", "label", "PATIENT")] == ["failed", "p2", "normal", ""]
    again = run_slides(collect_jobs([path]), small_model(), RunSettings(tmp_path / "out"))
    assert [outcome.status for outcome in again] == ["skipped", "failed"]
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        assert {row["slide_id"]: row["label"] for row in csv.DictReader(file)} == {"disc": "tumour", "gone": "normal"}
