"""``maskattn train`` from the command line: its configuration, and each bad input a sentence with a remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

pytest.importorskip("pytorch_lightning")

from small_cohorts import WIDTH, read_table, write_cohort, write_slide, write_table

from maskattn.cli.app import app


def maskattn(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *(str(argument) for argument in arguments)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_cohort(tmp_path, patients=8, classes=2, tiles=6)


def asked(files: tuple[Path, Path], out: Path, *more: object) -> Result:
    given = ("--features", files[0], "--labels", files[1], "--target", "grade", "--task", "binary", "--device", "cpu")
    return maskattn(*given, "--model", "mean", "--epochs", 1, "--out", out, *more)


def refused(result: Result, *parts: str) -> None:
    """One line that holds these parts, and the exit code of wrong usage or of a slide."""
    (line,) = result.stderr.splitlines()
    assert result.exit_code in (1, 2)
    for part in parts:
        assert part in line, line


def relabelled(files: tuple[Path, Path], **changed: str) -> None:
    """The labels with some cells changed: slide id → grade."""
    rows = read_table(files[1])
    for row in rows:
        row["grade"] = changed.get(row["slide_id"], row["grade"])
    write_table(files[1], rows)


def test_a_run_says_what_it_found_and_where_the_model_is(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = asked(files, tmp_path / "run", "--validation-share", 0.5)
    assert result.exit_code == 0, result.output
    assert "best epoch 1 of 1: loss" in result.stdout
    assert "maskattn infer --model" in result.stdout
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_configuration_that_is_written_back_asks_for_the_same_run(files: tuple[Path, Path], tmp_path: Path) -> None:
    first = asked(files, tmp_path / "run", "--lr", 0.003, "--validation-share", 0.5)
    assert first.exit_code == 0, first.output
    written = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (written["lr"], written["model"], written["epochs"]) == (0.003, "mean", 1)
    again = maskattn("--config", tmp_path / "run" / "run.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_flags_count_more_than_the_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "asked.yaml"
    config.write_text(
        "features: features\nlabels: labels.csv\ntarget: grade\ntask: binary\nmodel: max\nepochs: 1\n"
        "validation-share: 0.5\nprecision: 32\nclasses: [0, 1]\ndevice: cpu\n"
    )
    result = maskattn("--config", config, "--model", "mean", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (written["model"], written["epochs"], written["classes"]) == ("mean", 1, ["0", "1"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epoch: 3\n", ("'epoch' (do you mean 'epochs'?)", "asked.yaml")),
        ("epochs: many\nlr: -1\n", ("epochs input should be a valid integer", "lr input should be greater")),
        ("- 1\n", ("got a list",)),
        ("a: [\n", ("must be YAML",)),
    ],
)
def test_a_configuration_with_faults_names_them(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "asked.yaml").write_text(text)
    refused(maskattn("--config", tmp_path / "asked.yaml", "--out", tmp_path / "run"), *parts)


def test_what_is_not_given_is_named(tmp_path: Path) -> None:
    refused(maskattn(), "got no --out")
    refused(maskattn("--out", tmp_path / "run", "--task", "survival"), "no --features, --labels, --time, --event")


def test_labels_without_features_and_the_reverse_are_counted_and_listed(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = read_table(files[1])
    write_table(files[1], [*rows[1:], {**rows[0], "slide_id": "lost"}])
    refused(
        asked(files, tmp_path / "run"),
        "1 have a label and no features (lost)",
        f"1 have features and no row of labels ({rows[0]['slide_id']})",
        "--skip-missing",
        "left_out.csv",
    )
    assert [row["slide_id"] for row in read_table(tmp_path / "run" / "left_out.csv")] == ["lost", rows[0]["slide_id"]]
    result = asked(files, tmp_path / "run", "--skip-missing", "--validation-share", 0.4)
    assert result.exit_code == 0, result.output
    assert "2 slides are left out" in result.stderr


def test_labels_and_features_of_other_ids_say_what_both_have(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [{**row, "slide_id": f"x-{row['slide_id']}"} for row in read_table(files[1])]
    write_table(files[1], rows)
    refused(asked(files, tmp_path / "run"), "none that has both", "'x-s00a'", "'s00a'")


def test_an_unknown_column_says_what_there_is(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = asked(files, tmp_path / "run", "--target", "grad")
    refused(result, "must have the column 'grad', got the columns slide_id, patient_id, grade", "'grade'?")


def test_one_class_only(files: tuple[Path, Path], tmp_path: Path) -> None:
    relabelled(files, **{row["slide_id"]: "1" for row in read_table(files[1])})
    refused(asked(files, tmp_path / "run"), "exactly two classes, got 1 (8 slides)")


def test_three_classes_of_a_binary_task(files: tuple[Path, Path], tmp_path: Path) -> None:
    relabelled(files, s00a="2")
    refused(asked(files, tmp_path / "run"), "exactly two classes", "--task multiclass or ordinal")


def test_ordinal_classes_that_are_words_need_their_order(files: tuple[Path, Path], tmp_path: Path) -> None:
    relabelled(files, **{row["slide_id"]: ("low", "high")[i % 2] for i, row in enumerate(read_table(files[1]))})
    refused(asked(files, tmp_path / "run", "--task", "ordinal"), "--class LOWEST --class NEXT")
    result = asked(
        files, tmp_path / "run", "--task", "ordinal", "--class", "low", "--class", "high", "--validation-share", 0.5
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("cell", ["", "nan", "NA"])
def test_a_label_that_is_missing(cell: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    relabelled(files, s03a=cell)
    refused(asked(files, tmp_path / "run"), "1 have nothing, NaN or NA in grade (s03a)", "--skip-missing")


def test_a_value_that_is_no_number(files: tuple[Path, Path], tmp_path: Path) -> None:
    relabelled(files, s03a="high")
    refused(asked(files, tmp_path / "run", "--task", "regression"), "finite numbers, got 'high' for 's03a'")


def test_an_event_that_is_neither_one_nor_nought(files: tuple[Path, Path], tmp_path: Path) -> None:
    given = ("--features", files[0], "--labels", files[1], "--task", "survival", "--out", tmp_path / "run")
    refused(maskattn(*given, "--time", "months", "--event", "months"), "1 (observed) or 0 (censored)")


def test_too_few_patients(files: tuple[Path, Path], tmp_path: Path) -> None:
    write_table(files[1], read_table(files[1])[:2])
    result = asked(files, tmp_path / "run", "--skip-missing")
    refused_lines = result.stderr.splitlines()
    assert result.exit_code == 2
    assert "every class must have a patient in every fold" in refused_lines[-1]


def test_features_with_nan_are_found_before_anything_is_trained(files: tuple[Path, Path], tmp_path: Path) -> None:
    features_TC = np.ones((6, WIDTH), np.float32)
    features_TC[2, 3] = np.nan
    write_slide(files[0], "s01a", features_TC)
    result = asked(files, tmp_path / "run", "--validation-share", 0.5)
    refused(result, "features must be finite", "1 of 6 tiles", "s01a")
    assert not (tmp_path / "run" / "log.csv").exists()


@pytest.mark.parametrize(
    ("header", "width", "part"),
    [
        ({"encoder": "virchow2"}, WIDTH, "encoder virchow2 instead of uni on 1 slides (s01a)"),
        ({}, WIDTH + 1, f"width of features {WIDTH + 1} instead of {WIDTH} on 1 slides (s01a)"),
        ({"token_mask": "tissue"}, WIDTH, "token mask tissue instead of none"),
        ({"spacing_um": 1.0}, WIDTH, "µm per pixel 1.0 instead of 0.5"),
    ],
)
def test_features_of_two_kinds(
    header: dict[str, object], width: int, part: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in files[0].rglob("*s01a*"):
        path.unlink()
    write_slide(files[0], "s01a", np.ones((6, width), np.float32), **header)
    refused(asked(files, tmp_path / "run", "--validation-share", 0.5), part, "of 8 slides")


def test_a_patient_with_two_labels(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = read_table(files[1])
    rows[1]["patient_id"] = rows[0]["patient_id"]
    write_table(files[1], rows)
    refused(asked(files, tmp_path / "run"), "one label, got different ones", "--fusion none")


def test_a_table_with_a_row_twice(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = read_table(files[1])
    write_table(files[1], [*rows, rows[0]])
    refused(asked(files, tmp_path / "run"), "one row of labels, got two of 's00a'")


def test_a_folder_that_has_another_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    refused(asked(files, tmp_path / "run", "--validation-share", 0.5), "a model and no run.yaml", "name another")


def test_clam_and_stamp_name_their_columns_otherwise(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = read_table(files[1])
    write_table(
        files[1],
        [{"case_id": row["patient_id"], "slide_id": f"{row['slide_id']}.svs", "label": row["grade"]} for row in rows],
    )
    result = asked(files, tmp_path / "clam", "--target", "label", "--validation-share", 0.5)
    assert result.exit_code == 0, result.output
    write_table(files[1], [{"PATIENT": row["patient_id"], "grade": row["grade"]} for row in rows])
    refused(asked(files, tmp_path / "stamp"), "a column slide_id", "--slide-table")
    slides = write_table(
        tmp_path / "slides.csv",
        [{"PATIENT": row["patient_id"], "FILENAME": f"{row['slide_id']}.h5"} for row in rows],
    )
    result = asked(files, tmp_path / "stamp", "--slide-table", slides, "--validation-share", 0.5)
    assert result.exit_code == 0, result.output
    predictions = [read_table(tmp_path / name / "patient-preds.csv") for name in ("clam", "stamp")]
    assert [row["PATIENT"] for row in predictions[0]] == [row["PATIENT"] for row in predictions[1]]


def test_a_split_of_the_users_own(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = read_table(files[1])
    parts = [
        {"fold": 0, "sample_id": row["slide_id"], "split": "tune" if index < 4 else "train"}
        for index, row in enumerate(rows)
    ]
    table = write_table(tmp_path / "splits.csv", parts)
    result = asked(files, tmp_path / "run", "--split", table)
    assert result.exit_code == 0, result.output
    named = [row["PATIENT"] for row in read_table(tmp_path / "run" / "patient-preds.csv")]
    assert named == [row["patient_id"] for row in rows[:4]]
