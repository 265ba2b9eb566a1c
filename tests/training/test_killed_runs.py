"""A training that is killed anywhere and started again ends with the weights of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_cohorts import read_table, write_cohort

SCRIPT = Path(__file__).with_name("killed_runs.py")


def run(features: Path, labels: Path, *runs: str) -> None:
    root = SCRIPT.parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(features), str(labels), *runs],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_bit_by_bit_as_an_undisturbed_one(tmp_path: Path) -> None:
    features, labels = write_cohort(tmp_path, patients=15, classes=3, slides_each=2, tiles=15)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Before any state; in the best weights of the second epoch; between them and its state; in an epoch.
    places = ("batch:3", "sync:3", "sync:2", "batch:2", "end")
    run(features, labels, f"{whole}@end", *(f"{killed}@{place}" for place in places))
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert (whole / "patient-preds.csv").read_bytes() == (killed / "patient-preds.csv").read_bytes()
    rows = [[{**row, "seconds": ""} for row in read_table(folder / "log.csv")] for folder in (whole, killed)]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 2
    assert not list(killed.rglob("*.partial"))
