"""A training that is killed anywhere and started again ends with the weights of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("openslide")

from small_cohorts import read_table, write_cohort
from small_tiles import write_tile_data

SCRIPT = Path(__file__).with_name("killed_runs.py")


def run(source: str, folder: Path, *runs: str) -> None:
    root = SCRIPT.parents[2]
    paths = os.pathsep.join(str(path) for path in (root, SCRIPT.parents[1]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), source, str(folder), *runs],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_equal_runs(whole: Path, killed: Path, *files: str) -> None:
    for name in (*files, "model.safetensors", "patient-preds.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    rows = [[{**row, "seconds": ""} for row in read_table(folder / "log.csv")] for folder in (whole, killed)]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 2
    assert not list(killed.rglob("*.partial"))


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_bit_by_bit_as_an_undisturbed_one(tmp_path: Path) -> None:
    write_cohort(tmp_path, patients=15, classes=3, slides_each=2, tiles=15)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Before any state; in the best weights of the second epoch; between a state and its row of the log; between best
    # weights and their state; in an epoch; before the model has its name.
    places = ("batch:3", "sync:3", "rename:log.csv:2", "sync:2", "batch:2", "rename:model.safetensors:1", "end")
    run("features", tmp_path, f"{whole}@end", *(f"{killed}@{place}" for place in places))
    assert_equal_runs(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["patches", "slides"])
def test_a_killed_fine_tuning_goes_on_and_ends_bit_by_bit_as_an_undisturbed_one(source: str, tmp_path: Path) -> None:
    write_tile_data(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Before any state; between the first best weights and their state; between the first state and its row of the log;
    # in the last epoch; between the last state and its row; before the encoder has its name.
    places = ("batch:1", "sync:2", "rename:log.csv:1", "batch:4", "rename:log.csv:2", "rename:encoder.safetensors:1")
    run(source, tmp_path, f"{whole}@end", *(f"{killed}@{place}" for place in (*places, "end")))
    assert_equal_runs(whole, killed, "encoder.safetensors")
