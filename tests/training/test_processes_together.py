"""Two processes that train together, with gloo on the CPU, learn what one learns from the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_cohorts import read_table, write_cohort

ROOT = Path(__file__).resolve().parents[2]


def train(files: tuple[Path, Path], out: Path, *more: object) -> None:
    asked = ("--features", files[0], "--labels", files[1], "--target", "grade", "--task", "multiclass", "--out", out)
    model = ("--model", "abmil", "--width", 16, "--dropout", 0, "--epochs", 2, "--lr", 0.01, "--device", "cpu")
    done = subprocess.run(
        [sys.executable, "-m", "maskattn", "train", *map(str, (*asked, *model, *more))],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best epoch") == 1


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file

    files = write_cohort(tmp_path, patients=20, classes=2, tiles=8)
    train(files, tmp_path / "one", "--batch-size", 4)
    train(files, tmp_path / "two", "--batch-size", 2, "--devices", 2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        if name.endswith("attention_c.bias"):
            continue  # a softmax does not see it: what moves it is rounding alone
        assert weight.numpy() == pytest.approx(two[name].numpy(), abs=2e-5), name
    logs = [read_table(tmp_path / name / "log.csv") for name in ("one", "two")]
    for row, other in zip(*logs, strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), abs=1e-5)
        assert float(row["validation_loss"]) == pytest.approx(float(other["validation_loss"]), abs=1e-5)
