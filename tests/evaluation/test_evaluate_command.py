"""``maskattn evaluate``: a report that stands alone, and every bad table told in one line."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from maskattn.cli.app import app
from maskattn.evaluation import Predictions

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def classes(count=2, patients=120, seed=0, names=None, noise=1.0):
    draw = np.random.default_rng(seed)
    truth = np.random.default_rng(99).integers(0, count, patients)
    logits = draw.normal(0, noise, (patients, count)) + 1.5 * np.eye(count)[truth]
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    task = "binary" if count == 2 else "multiclass"
    return Predictions(
        task, "grade", [f"p{index}" for index in range(patients)], scores, truth, names or "abcdef"[:count]
    )


def survival(patients=90, seed=0):
    draw = np.random.default_rng(seed)
    risk = draw.normal(size=patients)
    died, left = draw.exponential(np.exp(-risk)), draw.exponential(1.5, patients)
    names = [f"p{index}" for index in range(patients)]
    return Predictions("survival", "death", names, risk[:, None], time_P=np.minimum(died, left), event_P=died <= left)


def regression(patients=90, seed=0):
    draw = np.random.default_rng(seed)
    truth = draw.normal(60, 10, patients)
    names = [f"p{index}" for index in range(patients)]
    return Predictions("regression", "age", names, (truth + draw.normal(0, 5, patients))[:, None], truth)


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


class Page(html.parser.HTMLParser):
    """Whether tags are closed in order, and what the page loads."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.headings, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


@pytest.mark.parametrize(
    ("predictions", "figures"),
    [
        (classes(), {"preds-confusion", "preds-precision-recall", "preds-reliability", "preds-roc"}),
        (classes(4), {"preds-confusion", "preds-precision-recall", "preds-reliability", "preds-roc"}),
        (survival(), {"preds-kaplan-meier"}),
        (regression(), {"preds-scatter"}),
    ],
    ids=lambda value: getattr(value, "task", ""),
)
def test_a_table_becomes_metrics_figures_and_a_page_that_stands_alone(tmp_path, predictions, figures):
    predictions.write_csv(tmp_path / "preds.csv")
    done = run(tmp_path / "preds.csv", "--out", tmp_path / "out", "--resamples", 200)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]["preds"]
    assert told["task"] == predictions.task
    assert all(found["low"] < found["value"] < found["high"] for found in told["metrics"].values())
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == figures
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/png;")) for link in page.loads)
    assert POLICY in html.unescape(text)
    assert text.count("<svg") == len(figures)
    assert "#1c1f23" not in text.partition("<body")[2]  # the ink of drawings follows the page's
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figures", "metrics.json", "report.html"]


def test_ids_of_drawings_do_not_meet(tmp_path):
    classes().write_csv(tmp_path / "one.csv")
    classes(seed=1).write_csv(tmp_path / "two.csv")
    run(tmp_path / "one.csv", tmp_path / "two.csv", "--out", tmp_path / "out", "--resamples", 100)
    drawings = re.findall(r"<svg.*?</svg>", (tmp_path / "out" / "report.html").read_text(), re.DOTALL)
    hashed = [set(re.findall(r'id="(p[0-9a-f]{8,}|[mC][0-9a-f_]{8,})"', drawing)) for drawing in drawings]
    assert sum(map(len, hashed)) == len(set().union(*hashed))
    for drawing, own in zip(drawings, hashed, strict=True):
        assert set(re.findall(r"url\(#(p[0-9a-f]+)\)", drawing)) <= own


def test_two_models_are_compared_over_shared_patients(tmp_path):
    classes().write_csv(tmp_path / "good.csv")
    classes(noise=4.0, seed=5).of(range(100)).write_csv(tmp_path / "bad.csv")
    done = run(tmp_path / "good.csv", tmp_path / "bad.csv", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparisons"]
    assert [(one["first"], one["second"]) for one in told] == [("good", "bad")]
    auc = told[0]["differences"][0]
    assert auc["difference"]["high"] < 0
    assert auc["p"] < 0.05
    assert "bad less good" in Page((tmp_path / "out" / "report.html").read_text()).headings
    assert "bad less good: AUC" in done.output


def test_a_folder_of_stamps_folds_is_one_model(tmp_path):
    whole = classes()
    for fold in range(3):
        folder = tmp_path / "stamp" / f"split-{fold}"
        folder.mkdir(parents=True)
        whole.of(np.arange(120) % 3 == fold).write_csv(folder / "patient-preds.csv")
    assert run(tmp_path / "stamp", "--out", tmp_path / "out").exit_code == 0
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]["stamp"]
    assert told["patients"] == 120
    assert [fold["patients"] for fold in told["by_fold"]] == [40, 40, 40]
    shutil.copytree(tmp_path / "stamp" / "split-0", tmp_path / "stamp" / "split-9")
    done = run(tmp_path / "stamp", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "a patient must have one row, got several of p0" in " ".join(done.output.split())


def test_files_of_one_name_are_called_by_their_folders(tmp_path):
    for model in ("vit", "abmil"):
        (tmp_path / model).mkdir()
        classes().write_csv(tmp_path / model / "patient-preds.csv")
    files = [tmp_path / model / "patient-preds.csv" for model in ("vit", "abmil")]
    run(*files, "--out", tmp_path / "out", "--resamples", 100)
    assert list(json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]) == ["vit", "abmil"]


def test_validation_gives_a_temperature_and_the_positive_class_may_be_named(tmp_path):
    classes(names=("yes", "no")).write_csv(tmp_path / "test.csv")
    other = classes(names=("yes", "no"), seed=3)
    replace(other, patient_ids=tuple(f"v{name}" for name in other.patient_ids)).write_csv(tmp_path / "val.csv")
    done = run(
        tmp_path / "test.csv", "--validation", tmp_path / "val.csv", "--positive", "yes", "--out", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]["test"]
    assert told["classes"] == ["no", "yes"]
    assert told["temperature"] > 0
    assert set(told["calibrated"]) == {"brier", "ece"}


def test_strange_names_are_text_in_the_page_and_break_no_file_name(tmp_path):
    names = ("<script>alert(1)</script>", "$x_1$ & 甲")
    classes(names=names).write_csv(tmp_path / "a&b <i>.csv")
    done = run(tmp_path / "a&b <i>.csv", "--out", tmp_path / "out", "--resamples", 100)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "<script" not in text
    assert names[1] in page.text
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} >= {"a-b-i-roc.png", "a-b-i-roc.svg"}


def test_a_perfect_model_has_values_and_says_why_it_has_no_intervals(tmp_path):
    truth = np.arange(60) % 2
    Predictions("binary", "msi", range(60), np.eye(2)[truth] * 0.9 + 0.05, truth, ("no", "yes")).write_csv(
        tmp_path / "perfect.csv"
    )
    done = run(tmp_path / "perfect.csv", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]["perfect"]["metrics"]["auc"]
    assert (found["value"], found["low"], found["high"]) == (1.0, None, None)
    assert "auc has no interval: it is the same in every resample" in "".join(
        Page((tmp_path / "out" / "report.html").read_text()).text
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("PATIENT,g,pred,g_x,g_y\na,x,x,0.9,0.1\nb,x,x,0.8,0.2\n", "patients of two classes or more, got only x"),
        ("id,g,pred\na,x,x\n", "must have a column PATIENT, got the columns id, g, pred"),
        ("PATIENT,g,pred,g_x,g_y\na,x,x,0.9,0.3\nb,y,y,0.8,0.2\n", "must sum to 1, got 1.2 for a"),
        ("PATIENT,pred_score,time,event\na,1,3,0\nb,2,4,0\n", "got 0 events in 2 patients"),
    ],
)
def test_what_cannot_be_evaluated_ends_with_one_line_code_2_and_no_output(tmp_path, text, told):
    (tmp_path / "preds.csv").write_text(text)
    done = run(tmp_path / "preds.csv", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_models_of_different_tasks_are_not_compared(tmp_path):
    classes().write_csv(tmp_path / "one.csv")
    survival().write_csv(tmp_path / "two.csv")
    done = run(tmp_path / "one.csv", tmp_path / "two.csv", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "must have one task, got 'binary' and 'survival'" in " ".join(done.output.split())


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    classes().write_csv(tmp_path / "one.csv")
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "one.csv", "--out", tmp_path / "file" / "out", "--resamples", 100)
    assert done.exit_code == 2
    assert "an evaluation must be written completely, got" in " ".join(done.output.split())


def test_nothing_of_evaluation_loads_torch():
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from maskattn.evaluation import report, inputs, comparison, split_files, results, survival_curves\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
