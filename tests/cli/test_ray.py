"""``--engine ray``: on one machine with several nodes, the slides come out as without Ray, once each."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from process_groups import group_is_gone
from small_slides import small_model, tissue_image, write_slide
from test_devices import asked, members, outputs
from typer.testing import CliRunner

import maskattn
from maskattn.cli.app import app
from maskattn.cli.ray_engine.actor import DeviceActor, look_around
from maskattn.cli.ray_engine.cluster import problem_of
from maskattn.cli.ray_engine.crew import how_it_was_lost
from maskattn.cli.ray_engine.placement import Node, Place, places_on, processes_of_cpu
from maskattn.cli.slide_runs import Chosen, Inference
from maskattn.slide.fleet.members import Member, forget_process, members_of
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.summary import read_summary

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; `make test-ray` runs these")

GPU_NODE = Node("a", "gpu", cpus=16, gpus=2, gpu_memory_gib=79.6)
SMALL_GPU_NODE = Node("b", "small", cpus=4, gpus=1, gpu_memory_gib=11.9)
CPU_NODE = Node("c", "cpu", cpus=3, gpus=0)


def test_each_gpu_has_a_process_and_cores_are_shared_out() -> None:
    places = places_on([GPU_NODE, CPU_NODE, SMALL_GPU_NODE], None, None)
    assert [(place.node.name, place.number, place.of, place.device) for place in places] == [
        ("gpu", 0, 2, "cuda"),
        ("gpu", 1, 2, "cuda"),
        ("small", 0, 1, "cuda"),
    ]
    assert [(place.num_cpus, place.num_gpus) for place in places] == [(8, 1), (8, 1), (4, 1)]


def test_gpu_is_shared_by_as_many_processes_as_fit_and_small_ones_are_left_out() -> None:
    places = places_on([GPU_NODE, SMALL_GPU_NODE], None, 24)
    assert [str(place) for place in places] == [f"GPU of gpu (process {number} of 6)" for number in range(1, 7)]
    assert sum(place.num_gpus for place in places[:3]) <= 1
    assert sum(place.num_cpus for place in places) <= 16
    assert places_on([SMALL_GPU_NODE], None, 12) == []
    assert places_on([Node("d", "unknown", 4, 1)], None, 1) == []


def test_cpus_are_used_where_there_is_no_gpu_or_they_are_asked_for() -> None:
    assert [str(place) for place in places_on([CPU_NODE, CPU_NODE], None, None)] == ["CPU of cpu"] * 2
    places = places_on([GPU_NODE, CPU_NODE], 4, None)
    assert [place.device for place in places] == ["cpu"] * 8
    assert [place.num_cpus for place in places] == [4.0] * 4 + [0.75] * 4
    assert [processes_of_cpu(text) for text in (None, "all", "cpu", "cpu:4")] == [None, None, 1, 4]
    for text in ("0,1", "cpu:0", "cpu:x", "all:2"):
        with pytest.raises(ValueError, match=r"--devices with --engine ray takes all, cpu.*; Ray itself assigns"):
            processes_of_cpu(text)


def test_node_without_the_folder_is_told_from_one_that_sees_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    assert look_around([str(tmp_path)], str(mark), False)[1:] == ([], None)
    # A folder of the same name that is another one lacks the mark.
    assert look_around([], str(tmp_path / "none"), False)[1] == [str(tmp_path)]
    assert look_around([str(tmp_path / "slides")], str(mark), False)[1] == [str(tmp_path / "slides")]


def test_memory_of_the_smallest_gpu_is_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 24576\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert look_around([], str(tool), True)[2] == 24.0


def work_on(folder: Path, slides: int) -> Inference:
    """A command's work over one slide under many names."""
    slide = write_slide(folder / "disc.tiff", tissue_image())
    small_model().save(folder / "model.safetensors")
    jobs = [SlideJob(f"s{number:03d}", slide) for number in range(slides)]
    return Inference(jobs, Chosen(model=folder / "model.safetensors"), RunSettings(folder / "out", workers=0))


def place_on_cpu() -> Place:
    (place,) = places_on([Node("e", "here", 1, 0)], None, None)
    return place


def test_actor_sends_reports_and_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    actor = DeviceActor(pickle.dumps(work_on(tmp_path, 2)), place_on_cpu(), str(tmp_path))
    packed, code = [], None
    while code is None:
        more, code = actor.reports()
        packed += more
    assert code == 0
    assert [kind for kind, *_ in map(pickle.loads, packed) if kind != "tiles"] == [
        "note",
        *["started", "ended"] * 2,
        "done",
    ]
    assert len(list((tmp_path / "out").glob("s*/prediction.json"))) == 2
    # A fiftieth of the pixels that were decoded.
    assert sum(map(len, packed)) < 2 * tissue_image().nbytes / 50


def test_actor_that_is_ended_gives_its_slide_back_though_nobody_takes_its_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    actor = DeviceActor(pickle.dumps(work_on(tmp_path, 400)), place_on_cpu(), str(tmp_path))
    out = tmp_path / "out"
    deadline = time.monotonic() + 120
    while not list(out.glob("s*/prediction.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (pid,) = members(out)
    assert actor.process() == (socket.gethostname(), pid)
    actor.end(30)
    assert not Path(f"/proc/{pid}").exists()
    finished = {path.parent.name for path in out.glob("s*/prediction.json")}
    assert {path.name for path in out.iterdir()} - {"summary.csv"} == finished


def test_process_that_is_known_to_have_ended_is_forgotten_alone(tmp_path: Path) -> None:
    with Member(tmp_path, 300, {}) as ours, Member(tmp_path, 300, {}) as same_process:
        forget_process(tmp_path, "elsewhere", os.getpid())
        forget_process(tmp_path, ours.process.host, os.getpid() + 1)
        assert set(members_of(tmp_path)) == {ours.token, same_process.token}
        forget_process(tmp_path, ours.process.host, os.getpid())
        assert not list(members_of(tmp_path))


def test_actor_that_ray_kills_for_its_memory_is_reported_as_such() -> None:
    oom = RuntimeError("The actor died: Task was killed due to the node running low on memory.")
    assert how_it_was_lost(oom) == "was killed for lack of memory on its node"
    assert how_it_was_lost(RuntimeError("The actor died unexpectedly")) == "was lost (RuntimeError)"


def test_nodes_that_cannot_run_the_slides_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class GetTimeoutError(Exception):
        pass

    class RayError(Exception):
        pass

    def get(answer: object, timeout: float) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    kinds = SimpleNamespace(GetTimeoutError=GetTimeoutError, RayError=RayError)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=get, exceptions=kinds))
    assert problem_of((maskattn.__version__, [], 24.0)) == ("", 24.0)
    missing, _ = problem_of((maskattn.__version__, ["/a", "/b", "/c", "/d"], None))
    assert "under the same path, got none at /a, /b, /c and 1 more; mount the drive there" in missing
    assert "got 0.0.1 there" in problem_of(("0.0.1", [], None))[0]
    assert "got no answer" in problem_of(GetTimeoutError())[0]
    assert "must be installed there, as here, got RayError: no module" in problem_of(RayError("no module"))[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "ray", "--device", "cpu"], "--engine ray runs on the devices of all nodes, got --device cpu"),
        (["--ray-address", "auto"], "--ray-address is an option of --engine ray, got it without; add --engine ray"),
        (["--gpu-memory-gib", "8"], "--gpu-memory-gib is an option of --engine ray, got it without"),
        (["--engine", "ray", "--devices", "0"], "--devices with --engine ray takes all, cpu, or cpu:N"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, options: list[str], told: str) -> None:
    ended = CliRunner().invoke(app, [*asked(tmp_path, 1), str(tmp_path / "out"), *options])
    assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1), ended.output
    assert told in ended.stderr


def test_missing_ray_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = CliRunner().invoke(app, [*asked(tmp_path, 1), str(tmp_path / "out"), "--engine", "ray"])
    assert ended.exit_code == 2
    assert "needs the package ray, which is not installed; pip install 'maskattn[ray]'" in ended.stderr


@needs_ray
def test_address_where_nothing_answers_is_refused_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    arguments = [*asked(tmp_path, 1), str(tmp_path / "out"), "--engine", "ray", "--ray-address"]
    nobody = CliRunner().invoke(app, [*arguments, address])
    assert (nobody.exit_code, nobody.stderr.count("\n")) == (2, 1), nobody.output
    assert f"must be that of a running cluster, got '{address}', where nothing answers" in nobody.stderr
    other = CliRunner().invoke(app, [*arguments, "ray://head:10001"])
    assert "--ray-address takes HOST:PORT of the cluster's head, or auto, got 'ray://head:10001'" in other.stderr


def command(arguments: list[str]) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "maskattn", *arguments, "--engine", "ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], what: str, found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextlib.contextmanager
def cluster_of(workers: int) -> Iterator[tuple[Cluster, list[object]]]:
    """A head that gives no cores away, and nodes of one core each."""
    from ray.cluster_utils import Cluster

    # By default it takes Ray a quarter of a minute to notice that a node has ended, longer than these slides take.
    soon = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(workers)]
    finally:
        cluster.shutdown()


@needs_ray
def test_node_that_is_killed_costs_no_slide_and_none_comes_twice(tmp_path: Path) -> None:
    slides = 60  # enough that the node is missed before they end
    arguments = asked(tmp_path, slides)
    alone = CliRunner().invoke(app, [*arguments, str(tmp_path / "alone")])
    assert alone.exit_code == 1
    out = tmp_path / "out"
    with cluster_of(2) as (cluster, nodes):
        process = command([*arguments, str(out), "--ray-address", cluster.address])
        wait_for(process, "both at work", lambda: len(members(out)) == 2 and any(out.glob("s*/prediction.json")))
        cluster.remove_node(nodes[0], allow_graceful=False)
        told, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert outputs(tmp_path / "alone") == outputs(out) != {}
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
    statuses = {name: row["status"] for name, row in read_summary(out / "summary.csv").items()}
    assert statuses == {"broken": "failed"} | {f"s{number:03d}": "ok" for number in range(slides)}
    assert told.startswith(f"{slides} of {slides + 1} slides have outputs")
    assert re.search(r"node .* has ended; the other nodes take its slides over", errors)
    reported = [line.split()[1].rstrip(":") for line in errors.splitlines() if line.startswith(("ok ", "failed "))]
    assert len(set(reported)) == len(reported) >= slides


@needs_ray
def test_process_is_started_again_and_ends_with_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = command([*asked(tmp_path, 400), str(out), "--devices", "cpu:1"])
    wait_for(process, "at work", lambda: bool(members(out)) and any(out.glob("s*/prediction.json")))
    (first,) = members(out)
    os.kill(first, signal.SIGKILL)
    wait_for(process, "started again", lambda: any(pid != first for pid in members(out)))
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "was killed by SIGKILL; it is being restarted" in errors
    assert errors.splitlines()[-1].endswith("finished slides are kept; run the same command again to resume")
    assert group_is_gone(process.pid)
    finished = {path.parent.name for path in out.glob("s*/prediction.json")}
    assert {path.name for path in out.iterdir()} - {"summary.csv"} == finished


@needs_ray
def test_no_process_outlives_a_command_that_is_killed_and_the_next_run_completes_its_slides(tmp_path: Path) -> None:
    out, slides = tmp_path / "out", 40
    arguments = [*asked(tmp_path, slides), str(out)]
    process = command([*arguments, "--devices", "cpu:2"])
    wait_for(process, "both at work", lambda: len(members(out)) == 2 and any(out.glob("s*/prediction.json")))
    at_work = members(out)
    process.kill()
    process.wait(timeout=120)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in at_work):
        assert time.monotonic() < deadline, "the processes of the devices end with the command"
        time.sleep(0.1)
    process.communicate(timeout=240)
    assert group_is_gone(process.pid, within_s=180)  # Ray's own agents end a minute later
    again = CliRunner().invoke(app, arguments)
    assert again.stdout.startswith(f"{slides} of {slides + 1} slides have outputs"), again.output
    assert {path.name for path in out.iterdir()} == {"summary.csv", *(f"s{number:03d}" for number in range(slides))}
