"""Two processes that train together, with gloo on the CPU, learn what one learns from the same batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("openslide")
pytest.importorskip("safetensors")

from safetensors.torch import load_file
from small_cohorts import read_table, write_cohort
from small_tiles import ENCODER, write_tile_data
from typer.testing import CliRunner

from maskattn.cli.app import app
from maskattn.training.bags import Draw
from maskattn.training.batches import CaseBatches, InOrder
from maskattn.training.loop import _accelerator
from maskattn.training.processes import check_counts
from maskattn.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
# As on a machine of a cluster, whose variables Lightning would otherwise take for a request to start all processes.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NAME": "x",
}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "maskattn", *map(str, arguments)]


def run_alone(*arguments: object) -> None:
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def run_together(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments, "--devices", 2), capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def of_slides(files: tuple[Path, Path], *more: object) -> list[object]:
    asked = ("--features", files[0], "--labels", files[1], "--target", "grade", "--task", "multiclass")
    return [*asked, "--model", "abmil", "--width", 16, "--dropout", 0, "--lr", 0.01, "--device", "cpu", *more]


def assert_equal_logs(one: Path, other: Path) -> None:
    rows = [read_table(folder / "log.csv") for folder in (one, other)]
    for row, again in zip(*rows, strict=True):
        for name in (name for name in row if name != "seconds"):
            assert float(row[name]) == pytest.approx(float(again[name]), abs=1e-5), name


def assert_equal_weights(one: Path, other: Path, unseen: tuple[str, ...]) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        if not name.endswith(unseen):
            assert weight.numpy() == pytest.approx(theirs[name].numpy(), abs=2e-5), name


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    files = write_cohort(tmp_path, patients=19, classes=2, tiles=8)
    one, two = tmp_path / "one", tmp_path / "two"
    run_alone("train", *of_slides(files), "--epochs", 2, "--batch-size", 4, "--out", one)
    done = run_together("train", *of_slides(files), "--epochs", 2, "--batch-size", 2, "--out", two)
    assert done.stdout.count("best epoch") == 1
    # A softmax does not see this bias: what moves it is rounding alone.
    assert_equal_weights(one / "model.safetensors", two / "model.safetensors", ("attention_c.bias",))
    assert_equal_logs(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["patches", "slides"])
def test_two_processes_fine_tune_an_encoder_as_one_does(source: str, tmp_path: Path) -> None:
    lab, one, two = write_tile_data(tmp_path), tmp_path / "one", tmp_path / "two"
    tile = ("train", "--stage", "tile", "--encoder", ENCODER, "--weights", lab / "encoder.safetensors")
    plain = ("--device", "cpu", "--dropout", 0, "--drop-path", 0, "--epochs", 2, "--freeze", 4, "--recompute")
    data: tuple[object, ...] = (
        "--patches",
        lab / "patches",
        "--validation-share",
        0.3,
        "--patient-pattern",
        r"^(p\d+)_",
    )
    if source == "slides":
        data = ("--slides", lab / "slides", "--labels", lab / "labels.csv", "--target", "grade", "--split")
        data = (*data, lab / "split.csv", "--spacing-um", 1, "--patch-size", 64, "--tiles-per-slide", 3)
        data = (*data, "--validation-tiles", 5)
    asked = (*tile, *plain, *data, "--token-mask", "tissue", "--drop-tokens", 0.2)
    run_alone(*asked, "--batch-size", 4, "--out", one)
    done = run_together(*asked, "--batch-size", 2, "--out", two)
    assert done.stdout.count("best epoch") == 1
    assert done.stderr.count("epoch   1:") == 1
    # Nor does attention see the bias of its keys, which is a third of this one.
    assert_equal_weights(one / "encoder.safetensors", two / "encoder.safetensors", ("attn.qkv.bias",))
    assert_equal_weights(one / "model.safetensors", two / "model.safetensors", ())
    assert_equal_logs(one, two)


@pytest.mark.slow
def test_folds_are_trained_together_one_after_the_other(tmp_path: Path) -> None:
    files = write_cohort(tmp_path, patients=16, classes=2, tiles=8)
    one, two = tmp_path / "one", tmp_path / "two"
    folds = ("--epochs", 1, "--folds", 2, "--resamples", 100)
    run_alone("crossval", *of_slides(files), *folds, "--batch-size", 4, "--out", one)
    done = run_together("crossval", *of_slides(files), *folds, "--batch-size", 2, "--out", two)
    assert done.stderr.count("training ") == 2
    rows = [read_table(folder / "patient-preds.csv") for folder in (one, two)]
    assert [row["PATIENT"] for row in rows[0]] == [row["PATIENT"] for row in rows[1]]
    for row, other in zip(*rows, strict=True):
        scores = [[float(each[name]) for name in each if name.startswith("grade_")] for each in (row, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_them_all_and_the_run_goes_on(tmp_path: Path) -> None:
    files = write_cohort(tmp_path, patients=11, classes=2, tiles=8)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    asked = ("train", *of_slides(files), "--epochs", 15, "--patience", 0, "--batch-size", 2, "--out")
    for first in (False, True):
        running = subprocess.Popen(
            command(*asked, killed, "--devices", 2), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        try:
            other = child_of(running, killed / "log.csv")
            os.kill(running.pid if first else other, signal.SIGKILL)
        except BaseException:
            running.kill()
            raise
        finally:
            _, told = running.communicate(timeout=300)
        if first:
            assert "the first process of the training has ended" in told
        else:
            assert running.returncode == 1
            assert "process 2 of 2 was killed, usually for lack of memory" in told
            assert "same command resumes" in told
        assert_gone(other)
    for out in (whole, killed):
        run_together(*asked, out)
    for name in ("model.safetensors", "patient-preds.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def child_of(running: subprocess.Popen[str], log: Path) -> int:
    """The process that was started by this one, once another epoch has ended."""
    before = log.stat().st_mtime_ns if log.exists() else 0
    for _ in range(2400):
        assert running.poll() is None, "it ended too early"
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        if children and log.exists() and log.stat().st_mtime_ns != before:
            return int(children[0])
        time.sleep(0.1)
    raise AssertionError("no epoch has ended")


def assert_gone(pid: int) -> None:
    for _ in range(300):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


def test_each_case_counts_once_however_many_processes_share_the_batches() -> None:
    values = torch.rand(23, dtype=torch.float64)
    for processes in (1, 2, 3, 5):
        parts = [list(CaseBatches(23, 4, 0, None, rank, processes)) for rank in range(processes)]
        sharing = [CaseBatches(23, 4, 0, None, rank, processes) for rank in range(processes)]
        for batch, one in enumerate(CaseBatches(23, 4, 0)):
            means = [values[[draw.index for draw in part[batch]]].mean() for part in parts]
            weighed = [mean * each.weight(batch) for mean, each in zip(means, sharing, strict=True)]
            assert float(sum(weighed)) / processes == pytest.approx(float(values[[d.index for d in one]].mean()))
        judged = [draw for rank in range(processes) for draw in InOrder(11, rank, processes)]
        assert sorted(judged, key=lambda draw: draw.index) == [Draw(index, 0) for index in range(11)]


def test_more_processes_than_validation_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got --devices 4 and 3 cases; use fewer"):
        check_counts(TrainSettings(devices=4), 3)
    check_counts(TrainSettings(devices=3), 3)
    files = write_cohort(tmp_path, patients=8, classes=2, tiles=8)
    result = CliRunner().invoke(
        app, [str(one) for one in ("train", *of_slides(files), "--devices", 5, "--out", tmp_path / "run")]
    )
    assert result.exit_code == 2
    assert "got --devices 5 and 2 cases" in result.stderr


@pytest.mark.parametrize(
    ("asked", "gpus", "words"),
    [
        ({"device": "cuda:1", "devices": 2}, 4, "got --devices 2 with --device cuda:1; give one of them"),
        ({"device": "cuda", "devices": 3}, 2, "--devices 3 where torch finds 2"),
        ({"device": "cuda:2"}, 2, "--device cuda:2 --devices 1 where torch finds 2"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    asked: dict[str, Any], gpus: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine with GPUs, of which nothing is asked but how many there are.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=words):
        _accelerator(TrainSettings(**asked), False)
