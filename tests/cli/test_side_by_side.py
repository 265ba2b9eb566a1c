"""A small model's slides are shared by several processes where a machine has cores, memory and no GPU for it."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_slides import small_model, write_slide

from maskattn.cli import devices, side_by_side, slide_runs
from maskattn.cli.side_by_side import gib_with_encoder, is_small_model, processes_for
from maskattn.cli.slide_runs import BUNDLED, Chosen, Inference, Where
from maskattn.nn import VisionTransformer
from maskattn.slide.layouts import read_features
from maskattn.slide.manifest import SlideJob
from maskattn.slide.remote.files import RemoteFile
from maskattn.slide.request import RunSettings

GIB = 2**20  # in the kernel's KiB
# The command line, which says in how many processes it runs slides if these are several.
NOTED = """
import sys
from maskattn.cli import devices, main
run = devices.run_on_devices
def noted(named, *rest):
    print("processes:", len(named), file=sys.stderr)
    return run(named, *rest)
devices.run_on_devices = noted
main()
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine with four cores and 8 GiB of free memory, in a process without torch."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "dev").mkdir()
    free(root, 8)
    return root


def free(root: Path, gib: float) -> None:
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {int(gib * GIB)} kB\n")


def equal(slides: int) -> list[int]:
    return [1_000_000] * slides


@pytest.mark.parametrize(("slides", "count"), [(1, 0), (15, 0), (16, 2), (31, 3), (32, 4), (1000, 4)])
def test_each_process_has_slides_enough_and_a_core(machine: Path, slides: int, count: int) -> None:
    assert processes_for(equal(slides), root=machine) == ["cpu"] * count


def test_many_cores_have_no_more_processes_than_that_pays(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert len(processes_for(equal(1000), root=machine)) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert processes_for(equal(1000), root=machine) == []


@pytest.mark.parametrize(("gib", "count"), [(0.5, 0), (1.4, 0), (1.6, 2), (2.4, 3)])
def test_processes_fit_into_the_free_memory(machine: Path, gib: float, count: int) -> None:
    free(machine, gib)
    assert processes_for(equal(1000), root=machine) == ["cpu"] * count


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ([], 0),
        ([0] * 16, 2),  # missing ones, of which the run will tell
        ([10] * 32 + [100], 0),  # the large one would be run when all others are finished
        ([10] * 320 + [100], 4),
        ([100] * 8 + [10] * 160, 3),
    ],
)
def test_no_process_waits_long_for_the_largest_slide(machine: Path, sizes: list[int], count: int) -> None:
    assert processes_for(sizes, root=machine) == ["cpu"] * count


def test_processes_with_an_encoder_take_more_memory(machine: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    with weights.open("wb") as file:
        file.truncate(128 << 20)  # a sparse file
    assert gib_with_encoder("timm:vit_small_patch16_224", weights) == gib_with_encoder(str(weights), None) == 1.25
    assert gib_with_encoder(str(tmp_path), None) is None  # a folder, whose library may start threads
    assert processes_for(equal(1000), 1.25, machine) == ["cpu"] * 4
    free(machine, 4.9)
    assert processes_for(equal(1000), 1.25, machine) == ["cpu"] * 3
    with weights.open("wb") as file:
        file.truncate((160 << 20) + 1)
    assert gib_with_encoder(str(weights), None) is None
    assert gib_with_encoder("timm:vit_small_patch16_224", None) is None  # still to be fetched


@pytest.mark.parametrize("name", ["nvidiactl", "dxg", "kfd"])
def test_where_there_is_a_gpu_it_runs_the_slides(machine: Path, name: str) -> None:
    (machine / "dev" / name).touch()
    assert processes_for(equal(1000), root=machine) == []


def test_no_process_is_forked_of_one_with_torch_or_on_another_system(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes_for(equal(1000), root=machine) == []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "torch", os)
    assert processes_for(equal(1000), root=machine) == []


def test_a_small_model_has_an_encoder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_small_model(BUNDLED)
    assert not is_small_model(tmp_path)
    assert not is_small_model(tmp_path / "none.pt")
    config = json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not is_small_model(tmp_path)  # without weights, which loading it reports
    (tmp_path / "model.safetensors").touch()
    assert is_small_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "abmil"}))
    assert not is_small_model(tmp_path)
    (tmp_path / "config.json").write_text("no card")
    assert not is_small_model(tmp_path)
    (tmp_path / "own").mkdir()
    small_model().save(tmp_path / "own/small.safetensors")
    assert is_small_model(tmp_path / "own/small.safetensors")
    (tmp_path / "own/small.json").unlink()
    assert not is_small_model(tmp_path / "own/small.safetensors")
    monkeypatch.setattr(side_by_side, "_SMALL_BYTES", 1_000_000)
    assert not is_small_model(BUNDLED)


def inference(tmp_path: Path, slides: int = 20, chosen: Chosen | None = None, **settings: Any) -> Inference:
    jobs = [SlideJob(f"s{number}", tmp_path / "none.svs") for number in range(slides)]
    return Inference(jobs, chosen or Chosen(), RunSettings(tmp_path / "out", **settings))


def test_only_a_command_that_names_no_device_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_runs, "processes_for", lambda sizes, _: ["cpu"] * len(sizes))
    monkeypatch.setattr(devices, "within_memory", lambda named, _: named)

    def of(work: Inference, where: Where | None = None) -> int:
        return len(slide_runs._processes(work, where or Where()))

    assert of(inference(tmp_path)) == 20
    assert of(inference(tmp_path, limit=3)) == 3
    assert of(inference(tmp_path, shard="1/4")) == 5
    remote = inference(tmp_path)
    remote.jobs[3] = replace(remote.jobs[3], origin=RemoteFile("s3://bucket/a.svs"))
    assert of(remote) == 0  # their store's client runs a thread
    assert of(inference(tmp_path), Where(device="cpu")) == 0
    assert of(inference(tmp_path), Where(devices="cpu")) == 1
    assert of(inference(tmp_path), Where(devices="cpu:3")) == 3
    assert of(inference(tmp_path, chosen=Chosen(encoder="timm:vit_tiny_patch16_224"))) == 0
    assert of(inference(tmp_path, chosen=Chosen(with_features=True))) == 0
    assert of(inference(tmp_path, chosen=Chosen(model=tmp_path))) == 0


def run(folder: Path, slides: int, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    slide = write_slide(folder / "disc.tiff")
    rows = [f"s{number:02d},{slide}" for number in range(slides)]
    (folder / "slides.csv").write_text("\n".join(["slide_id,slide_path", *rows, ""]))
    command, *rest = map(str, options)
    words = [sys.executable, "-c", NOTED, command, folder / "slides.csv", *rest, "--out", out]
    on_the_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=on_the_cpu)


def with_and_without_sharing(
    folder: Path, *options: object
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """Run 16 slides as the command would and in one process; check that only the first says in how many it runs."""
    both = run(folder, 16, folder / "both", *options)
    one = run(folder, 16, folder / "one", *options, "--device", "cpu")
    assert (both.returncode, one.returncode) == (0, 0), both.stderr + one.stderr
    assert both.stdout.replace("both", "one") == one.stdout
    count = processes_here()
    assert [line for line in both.stderr.splitlines() if line.startswith("processes: ")] == (
        [f"processes: {count}"] if count else []
    )
    assert "processes: " not in one.stderr
    return both, one


def processes_here() -> int:
    """In how many processes a command of 16 slides should run on this machine, by its cores, memory and GPUs."""
    code = "from maskattn.cli.side_by_side import processes_for; print(len(processes_for([1000] * 16)))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_command_of_many_slides_publishes_what_one_process_does(tmp_path: Path) -> None:
    small_model().save(tmp_path / "small.safetensors")
    both, _ = with_and_without_sharing(tmp_path, "infer", "--model", tmp_path / "small.safetensors")
    scores = {}
    for out in ("both", "one"):
        with (tmp_path / out / "summary.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert sorted(row["slide_id"] for row in rows) == [f"s{number:02d}" for number in range(16)]
        assert {row["status"] for row in rows} == {"ok"}
        scores[out] = [json.loads((tmp_path / out / f"s{n:02d}" / "prediction.json").read_text()) for n in range(16)]
        assert sorted(path.name for path in (tmp_path / out).iterdir() if path.is_file()) == ["summary.csv"]
    for ours, theirs in zip(scores["both"], scores["one"], strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)
    lines = [re.sub(r"[\d.]+ s$", "", line) for line in both.stderr.splitlines() if line.startswith("ok ")]
    assert len(lines) == 16


def test_features_of_many_slides_are_those_of_one_process(tmp_path: Path) -> None:
    vit = VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    options = ("--encoder", tmp_path / "vit.safetensors", "--num-heads", 2, "--spacing-um", 1, "--patch-size", 64)
    with_and_without_sharing(tmp_path, "extract", *options)
    ours, theirs = (sorted((tmp_path / out).rglob("features_*/*.h5")) for out in ("both", "one"))
    assert [path.stem for path in ours] == [path.stem for path in theirs] == [f"s{number:02d}" for number in range(16)]
    for left, right in zip(ours, theirs, strict=True):
        left, right = read_features(left), read_features(right)
        torch.testing.assert_close(torch.as_tensor(left.features_TC), torch.as_tensor(right.features_TC))
        assert (left.coords_T2 == right.coords_T2).all()
