"""``--devices``: a process for each device, which share the slides and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from process_groups import group_is_gone
from small_slides import small_model, tissue_image, write_slide
from typer.testing import CliRunner

from maskattn.cli.app import app
from maskattn.cli.devices import devices_named, loaded_once, shares_of_cores, within_memory
from maskattn.cli.free_memory import devices_that_fit, free_gib
from maskattn.cli.member_reports import settings_of_member
from maskattn.cli.slide_runs import Chosen, Inference
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.summary import read_summary


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("cpu:3", ["cpu"] * 3),
        ("cpu", ["cpu"]),
        ("0,1", ["cuda:0", "cuda:1"]),
        ("cuda:1, 1", ["cuda:1", "cuda:1"]),
        ("0,cpu:2", ["cuda:0", "cpu", "cpu"]),
        ("all", ["cuda:0", "cuda:1"]),
    ],
)
def test_devices_are_named_one_for_each_process(text: str, devices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_named(text) == devices


def test_all_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices_named("all") == ["cpu"]
    with pytest.raises(ValueError, match=r"names GPUs of this machine, got cuda:0 where it has 0; count from 0"):
        devices_named("cpu:2,0")


@pytest.mark.parametrize("text", ["", "cpu:0", "gpu", "cpu:x", "0,,1", "-1", "cuda:", "all,0", "tpu:1"])
def test_names_of_no_device_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"--devices takes all, or names separated by commas.*got .*; name the devices"
    ):
        devices_named(text)


def test_cores_are_shared_out_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8, 9, 10}, raising=False)
    assert shares_of_cores(3) == [(0, 1), (2, 3, 8), (9, 10)]
    assert shares_of_cores(9) == [(core,) for core in (0, 1, 2, 3, 8, 9, 10, 0, 1)]


def test_members_share_the_limit_and_take_large_slides_first(tmp_path: Path) -> None:
    members = [settings_of_member(RunSettings(tmp_path, limit=5, retry_failed=True), one, 3) for one in range(3)]
    assert [one.limit for one in members] == [2, 2, 1]
    assert [one.retry_failed for one in members] == [True, False, False]
    assert {one.order for one in members} == {"large-first"}
    assert settings_of_member(RunSettings(tmp_path, order="given"), 0, 2).order == "given"


def asked(folder: Path, slides: int, model: str = "model.safetensors") -> list[str]:
    """The arguments of a run over one slide under many names, and one that is broken."""
    slide = write_slide(folder / "disc.tiff", tissue_image())
    small_model().save(folder / "model.safetensors")
    (folder / "broken.svs").write_text("no slide")
    rows = [f"s{number:03d},{slide}" for number in range(slides)] + [f"broken,{folder / 'broken.svs'}"]
    (folder / "slides.csv").write_text("\n".join(["slide_id,slide_path", *rows, ""]))
    return ["infer", str(folder / "slides.csv"), "--model", str(folder / model), "--workers", "0", "--out"]


def outputs(out: Path) -> dict[str, bytes]:
    """All outputs but the times of stages."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/*")}
    for name in [name for name in found if name.endswith("prediction.json")]:
        found[name] = json.dumps({**json.loads(found[name]), "timings_s": None}).encode()
    return found


@pytest.mark.usefixtures("one_thread")
def test_processes_publish_what_one_does_and_report_each_slide_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where torch attends, as with this model's narrow heads, its sums depend on the number of threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = asked(tmp_path, 5)
    alone = CliRunner().invoke(app, [*arguments, str(tmp_path / "alone")])
    begun = CliRunner().invoke(app, [*arguments, str(tmp_path / "together"), "--devices", "cpu:3", "--limit", "1"])
    assert len(read_summary(tmp_path / "together" / "summary.csv")) == 1, begun.output
    together = CliRunner().invoke(app, [*arguments, str(tmp_path / "together"), "--devices", "cpu:2"])
    assert (alone.exit_code, together.exit_code) == (1, 1), together.output
    assert outputs(tmp_path / "alone") == outputs(tmp_path / "together") != {}
    lines = together.stderr.splitlines()
    names = sorted(line.split()[1].rstrip(":") for line in lines if line.startswith(("ok ", "skipped ", "failed ")))
    assert names == ["broken", *(f"s{number:03d}" for number in range(5))]
    assert sum("Random weights." in line for line in lines) == 1
    assert together.stdout.startswith("5 of 6 slides have outputs; summary: ")
    statuses = {name: row["status"] for name, row in read_summary(tmp_path / "together" / "summary.csv").items()}
    assert statuses.pop("broken") == "failed"
    assert sorted(statuses.values()) == ["ok"] * 4 + ["skipped"]


def test_errors_of_all_processes_are_one_line(tmp_path: Path) -> None:
    arguments = [*asked(tmp_path, 1, "none.safetensors"), str(tmp_path / "out")]
    both = CliRunner().invoke(app, [*arguments, "--devices", "cpu", "--device", "cpu"])
    assert (both.exit_code, both.stderr.count("\n")) == (2, 1)
    assert "--devices replaces --device, got --device cpu and --devices cpu; give one of them" in both.stderr
    missing = CliRunner().invoke(app, [*arguments, "--devices", "cpu:2"])
    alone = CliRunner().invoke(app, arguments)
    assert (missing.exit_code, missing.stderr) == (alone.exit_code, alone.stderr)
    assert missing.exit_code == 2


def started(arguments: list[str]) -> subprocess.Popen[str]:
    """A run in a process group of its own, both of whose members are at work."""
    out = Path(arguments[-1])
    process = subprocess.Popen(
        [sys.executable, "-m", "maskattn", *arguments, "--devices", "cpu:2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while len(members(out)) < 2 or not list(out.glob("s*/prediction.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def members(out: Path) -> list[int]:
    """The processes that take part."""
    pids = []
    for path in (out / ".fleet" / "members").glob("*.json"):
        try:
            pids.append(json.loads(path.read_text())["process"]["pid"])
        except (OSError, ValueError):
            continue
    return pids


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_processes_end_with_the_command_and_give_their_slides_back(tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "out"
    process = started([*asked(tmp_path, 400), str(out)])
    os.killpg(process.pid, number)  # to all, as SLURM and a terminal send it
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert errors.splitlines()[-1].endswith("finished slides are kept; run the same command again to resume")
    assert group_is_gone(process.pid)
    finished = {path.parent.name for path in out.glob("s*/prediction.json")}
    assert {path.name for path in out.iterdir()} - {"summary.csv"} == finished


def test_no_process_outlives_a_command_that_is_killed(tmp_path: Path) -> None:
    process = started([*asked(tmp_path, 400), str(tmp_path / "out")])
    process.kill()
    process.communicate(timeout=120)
    assert group_is_gone(process.pid)


def test_process_that_is_killed_is_started_again_and_loses_no_slide(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started([*asked(tmp_path, 20), str(out)])
    os.kill(members(out)[0], signal.SIGKILL)
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "the process of cpu was killed by SIGKILL; it is being restarted" in errors
    assert told.startswith("20 of 21 slides have outputs")
    assert {path.name for path in out.iterdir()} == {"summary.csv", *(f"s{number:03d}" for number in range(20))}


def test_processes_on_the_cpu_share_the_model_that_the_command_loaded(tmp_path: Path) -> None:
    arguments = [*asked(tmp_path, 6), str(tmp_path / "out"), "--devices", "cpu:2"]
    script = """
import os, sys
import maskattn.cli.slide_runs as slide_runs
from maskattn.cli.app import app
load = slide_runs.load_model
def loaded(*given):
    print("loaded by", os.getpid())
    return load(*given)
slide_runs.load_model = loaded
print("the command is", os.getpid(), flush=True)
assert "torch" not in sys.modules
app(sys.argv[1:])
"""
    run = subprocess.run([sys.executable, "-c", script, *arguments], check=False, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr  # of the broken slide
    command, loaded, outcome = run.stdout.splitlines()
    assert loaded.split()[-1] == command.split()[-1]
    assert outcome.startswith("6 of 7 slides have outputs")
    assert run.stderr.count("Random weights.") == 1


def test_process_that_starts_late_does_not_take_the_run_for_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = """
import os, sys, time
from pathlib import Path
from maskattn.cli import device_member
from maskattn.cli.app import app
out = Path(sys.argv.pop(1))
use_threads = device_member._use_threads
def be_late(threads):
    try:
        os.close(os.open(out.with_name("first"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        while len(list(out.glob("s*/prediction.json"))) < 4:
            time.sleep(0.02)
        time.sleep(1)
    use_threads(threads)
device_member._use_threads = be_late
app(sys.argv[1:])
"""
    arguments = [str(out), *asked(tmp_path, 4), str(out), "--devices", "cpu:2"]
    run = subprocess.run([sys.executable, "-c", script, *arguments], check=False, capture_output=True, text=True)
    assert (run.returncode, (tmp_path / "first").exists()) == (1, True), run.stderr
    statuses = {name: row["status"] for name, row in read_summary(out / "summary.csv").items()}
    assert statuses == {"broken": "failed"} | {f"s{number:03d}": "ok" for number in range(4)}
    assert not (out / ".fleet").exists()


def test_processes_load_the_model_themselves_where_a_fork_would_inherit_threads(tmp_path: Path) -> None:
    work = Inference([SlideJob("a", Path("a.svs"))], Chosen(), RunSettings(tmp_path))
    assert "torch" in sys.modules
    assert loaded_once(["cpu", "cpu"], work) is None


def system_files(root: Path, available_kib: int, cgroup: str, files: dict[str, str]) -> Path:
    """The files by which Linux tells its memory."""
    told = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available_kib} kB\n", "proc/self/cgroup": cgroup, **files}
    for name, text in told.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_is_the_least_of_the_machine_and_its_cgroups(tmp_path: Path) -> None:
    gib = 2**30
    outer = {"sys/fs/cgroup/a/memory.max": f"{3 * gib}", "sys/fs/cgroup/a/memory.current": f"{2 * gib}"}
    outer["sys/fs/cgroup/a/memory.stat"] = f"anon 5\ninactive_file {gib // 2}\n"
    inner = {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/b/memory.current": "5"}
    assert free_gib(system_files(tmp_path / "v2", 8 * 2**20, "0::/a/b\n", outer | inner)) == 1.5
    first = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * gib}",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{gib}",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    # A container sees its own cgroup as the root, under the path that it has on the host.
    assert free_gib(system_files(tmp_path / "v1", 8 * 2**20, "5:cpu:/x\n3:memory:/docker/1\n", first)) == 1.0
    assert free_gib(system_files(tmp_path / "none", 8 * 2**20, "0::/\n", {})) == 8.0
    assert free_gib(tmp_path / "another system") is None
    here = free_gib()
    assert here is None or here > 0


def test_processes_that_do_not_fit_into_memory_are_left_out_evenly() -> None:
    assert devices_that_fit(["cpu"] * 4, 0.75, 2.5) == ["cpu"] * 3
    assert devices_that_fit(["cuda:0", "cuda:0", "cuda:1", "cuda:1"], 8, 25) == ["cuda:0", "cuda:0", "cuda:1"]
    assert devices_that_fit(["cuda:0", "cuda:0", "cuda:1"], 8, 16) == ["cuda:0", "cuda:1"]
    assert devices_that_fit(["cpu"] * 2, 64, 1) == ["cpu"]
    assert devices_that_fit(["cpu"] * 2, 64, None) == ["cpu"] * 2


def test_command_tells_why_it_starts_fewer_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*asked(tmp_path, 1), str(tmp_path / "out"), "--memory-gib", "100000"]
    alone = CliRunner().invoke(app, arguments)
    assert (alone.exit_code, alone.stderr.count("\n")) == (2, 1)
    assert "--memory-gib is an option of --devices on one machine, got it without; add --devices" in alone.stderr
    assert within_memory(["cpu"] * 2, 0.001) == ["cpu"] * 2
    assert capsys.readouterr().err == ""
    assert within_memory(["cpu"] * 2, 100000) == ["cpu"]
    told = capsys.readouterr().err
    assert "2 processes of 100000 GiB need 200000 GiB of memory, got " in told
    assert "GiB free: one is started; --memory-gib says what a process needs" in told
