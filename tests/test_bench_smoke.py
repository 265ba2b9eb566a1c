"""The benches run: every family on one small point, and every peer computes what ours does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from oracles import assert_within_budget

from bench.gpu import peers
from bench.gpu.clock import DeviceClock
from bench.gpu.points import Case, Point, Problem, grid_of
from bench.gpu.record import Recorder, read_rows, table
from maskattn.attention import reference
from maskattn.options import Options

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[1]
SUITES = ROOT / "bench" / "gpu"

# FlexAttention would compile for half a minute.
QUICK_PEERS = [name for name in peers.PEERS if not name.startswith("flex")]
FAMILIES = {"attention", "options", "readout", "token_relevance", "packing", "multihead", "ViT-S/16"}


@pytest.fixture(scope="module")
def problem():
    return Problem(grid_of("smoke", "cpu")[0], "cpu")


@pytest.mark.parametrize("timed", [False, True], ids=["untimed", "timed, one family"])
def test_every_family_runs_and_is_recorded(tmp_path, timed):
    rows = tmp_path / "rows.csv"
    what = [str(SUITES / "test_packing.py")] if timed else [str(SUITES), "--benchmark-disable"]
    options = ["--bench-grid", "smoke", "--bench-impls", "torch", "--bench-csv", str(rows)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *what, *options]
    # pytest-benchmark times nothing in a worker of a parallel run, which this is not.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=alone)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    recorded = read_rows(rows)
    ran = [row for row in recorded if row.status == ("ok" if timed else "ran")]
    assert {row.family for row in ran if row.contender.startswith("maskattn")} >= ({"packing"} if timed else FAMILIES)
    assert all(row.reason for row in recorded if row.status == "skipped")
    assert all(row.torch == torch.__version__ and row.device for row in recorded)
    for row in ran if timed else []:
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.gbytes_per_s > 0


def test_nothing_is_started_after_the_time_is_up(tmp_path):
    rows = tmp_path / "rows.csv"
    options = ["--bench-grid", "smoke", "--bench-impls", "torch", "--bench-csv", str(rows), "--bench-seconds", "0"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(SUITES / "test_packing.py"),
        *options,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert {row.status for row in read_rows(rows)} == {"left out"}
    assert "left out: 6" in result.stdout


# torch's own jagged attention warns so from within.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("contender", ["maskattn packed, torch", "maskattn masked, torch", *QUICK_PEERS])
def test_every_contender_computes_the_same_attention(contender, problem):
    try:
        attend, inputs = peers.attention_of(contender, problem)
    except peers.UnsupportedError as reason:
        pytest.skip(str(reason))
    out = attend(*inputs)
    if contender == "sdpa unmasked":
        everything = Problem(Point(3, 80, 1.0, 2, 32, "fp32"), "cpu")
        attend, inputs = peers.attention_of(contender, everything)
        problem, out = everything, attend(*inputs)
    rows = out if peers.is_packed(inputs) else problem.kept_rows(out)

    def specified(dtype):
        q, k, v = (x.to(dtype) for x in problem.rows)
        starts = problem.packing.cu_seqlens
        return reference.packed_attention(q, k, v, starts, starts, Options(scale=q.shape[-1] ** -0.5))[0]

    assert_within_budget(rows, specified(torch.float64), specified(torch.float32), contender)


def test_the_table_compares_ours_with_the_best_peer_that_computes_the_same():
    recorder = Recorder(None, "cpu")
    case = Case("attention", "forward", Point(1, 64, 0.5, 2, 32, "fp32"), 0)
    for contender, p50_ms in (("maskattn packed, torch", 2.0), ("varlen_attn", 3.0), ("sdpa unmasked", 1.0)):
        recorder.add(case, contender, "ok", p50_ms=p50_ms, tflops=0.5)
    recorder.add(case, "xformers", "skipped", "is not installed")
    text = table(recorder.rows)
    assert "maskattn packed, torch | 2 | 0.5 | varlen_attn | 3 | 1.50×" in text
    assert "1 × xformers: is not installed" in text


def test_plots_are_drawn_of_every_length_and_share_that_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.gpu.plots import best_by_series, plot

    recorder = Recorder(None, "cpu")
    for tokens in (256, 1024, 4096):
        for kept in (0.06, 0.3, 1.0):
            point = Point(1, tokens, kept, 2, 64, "fp32")
            for speed, contender in ((1.0, "maskattn packed, torch"), (0.5, "sdpa bool mask, flash"), (0.1, "nested")):
                case = Case("attention", "forward", point, 0)
                recorder.add(case, contender, "ok", p50_ms=tokens / speed, tflops=speed)
    for variant, p50_ms in (("plain", 1.0), ("dropout", 1.5)):
        case = Case("options", "both", Point(1, 256, 0.3, 2, 64, "fp32"), 0, variant)
        recorder.add(case, "maskattn packed, torch", "ok", p50_ms=p50_ms)
    recorder.add(Case("attention", "forward", Point(1, 8192, 0.3, 2, 64, "fp32"), 0), "xformers", "skipped", "absent")
    paths = plot(recorder.rows, tmp_path)
    speeds = {f"speed_d64_f{kept}_fp32.png" for kept in ("0.06", "0.3", "1")}
    shares = {f"share_1x{tokens}_d64_fp32.png" for tokens in (256, 1024, 4096)}
    assert {path.name for path in paths} == speeds | shares | {"options_1x256_d64_fp32.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    lines = best_by_series([row for row in recorder.rows if row.status == "ok" and row.kept == 0.3], "tokens")
    assert list(lines["sdpa bool mask"]) == [256, 1024, 4096]


def test_the_device_clock_gives_the_seconds_between_two_events_of_one_round(monkeypatch):
    class Event:
        now_ms = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now_ms += 5
            self.at_ms = Event.now_ms

        def elapsed_time(self, later):
            return later.at_ms - self.at_ms

    cache, held = torch.ones(4), []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: cache)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", held.append)
    clock = DeviceClock()
    for _ in range(2):
        cache.fill_(1)
        assert clock() == 0
        assert not cache.any()
        time.sleep(0.003)
        assert clock() == 0.005
    # The device is held back for longer than the call before took to return, which is no part of its time.
    assert 0.003 < clock.host_seconds() < 0.1
    assert held[1] > held[0]
    assert held[1] / 2e9 > 0.003
    clock()
    clock.reset()
    assert clock() == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("grid", ["quick", "full"])
def test_grids_name_no_point_twice(grid, device):
    points = grid_of(grid, device)
    assert len(points) == len(set(points))
