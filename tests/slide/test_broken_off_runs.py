"""Runs that are killed, interrupted or out of disk space leave nothing half-written, and the next run continues."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from runs import OUTPUTS, Watch, names, statuses

from maskattn.errors import OutputError, SlideError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide import overlay
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.summary import read_summary
from maskattn.slide.unchanged import FileState

pytestmark = pytest.mark.usefixtures("one_thread")


def test_leftovers_of_a_killed_run_are_cleared_and_done_again(
    model: SlideModel, slide: Path, settings: RunSettings
) -> None:
    run_slides([SlideJob("kept", slide), SlideJob("half", slide)], model, settings)
    out = settings.out_dir
    (out / ".new.partial").mkdir()
    (out / ".new.partial" / "features.h5").write_text("half")
    (out / "kept").rename(out / ".kept.old")
    (out / "half" / "prediction.json").write_text('{"slide_id": "ha')
    outcomes = run_slides([SlideJob(name, slide) for name in ("kept", "half", "new")], model, settings)
    assert statuses(outcomes) == {"kept": "skipped", "half": "ok", "new": "ok"}
    assert names(out) == {"kept", "half", "new", "summary.csv"}


def test_interrupt_leaves_nothing_half_written(model: SlideModel, slide: Path, settings: RunSettings) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_slides(
            [SlideJob("a", slide), SlideJob("b", slide)], model, settings, Watch(settings.out_dir, "b", interrupt)
        )
    assert names(settings.out_dir) == {"a", "summary.csv"}
    assert list(read_summary(settings.out_dir / "summary.csv")) == ["a"]


def test_killed_run_continues_where_it_was(
    model: SlideModel, slide: Path, settings: RunSettings, tmp_path: Path
) -> None:
    model.save(tmp_path / "model.safetensors")
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from runs import Watch
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
slide, model, out = map(Path, sys.argv[1:])
jobs = [SlideJob(name, slide) for name in "abc"]
stop = Watch(out, "b", lambda: os.kill(os.getpid(), signal.SIGKILL))
run_slides(jobs, SlideModel.load(model), RunSettings(out, batch_size=8, workers=1), stop)
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, str(slide), str(tmp_path / "model.safetensors"), str(settings.out_dir)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,  # its decoding worker holds the pipes open until it ends too
    )
    assert killed.returncode == -9, killed.stderr
    left = names(settings.out_dir) - {"a", ".fleet", "summary.csv"}
    assert [re.fullmatch(r"\.b\.[0-9a-f]{12}\.partial", name) is not None for name in left] == [True]
    assert list(read_summary(settings.out_dir / "summary.csv")) == ["a"]
    outcomes = run_slides([SlideJob(name, slide) for name in "abc"], model, settings)
    assert statuses(outcomes) == {"a": "skipped", "b": "ok", "c": "ok"}
    assert names(settings.out_dir) == {"a", "b", "c", "summary.csv"}
    assert all(names(settings.out_dir / name) == OUTPUTS for name in "abc")


def test_full_disk_fails_the_slide_and_leaves_space_for_the_rest(
    model: SlideModel, slide: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, opened = Watch(settings.out_dir), h5py.File

    def full(path: Path, *mode: str) -> h5py.File:
        if progress.current == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, *mode)

    monkeypatch.setattr(h5py, "File", full)
    outcomes = run_slides([SlideJob("a", slide), SlideJob("b", slide)], model, settings, progress)
    assert statuses(outcomes) == {"a": "failed", "b": "ok"}
    assert "free space" in outcomes[0].reason
    assert names(settings.out_dir) == {"b", "summary.csv"}


def test_picture_that_cannot_be_written_fails_its_slide(
    model: SlideModel, slide: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, write = Watch(settings.out_dir), overlay.write_png

    def full(path: Path, image: np.ndarray) -> None:
        if progress.current == "a" and path.name == "attention.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, image)

    monkeypatch.setattr(overlay, "write_png", full)
    outcomes = run_slides([SlideJob("a", slide), SlideJob("b", slide)], model, settings, progress)
    assert statuses(outcomes) == {"a": "failed", "b": "ok"}
    assert "free space" in outcomes[0].reason
    assert names(settings.out_dir) == {"b", "summary.csv"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=144k", "none", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_that_fills_up_half_way_keeps_no_half_file(model: SlideModel, slide: Path, small_disk: Path) -> None:
    (outcome,) = run_slides([SlideJob("a", slide)], model, RunSettings(small_disk, batch_size=8, tokens=True))
    assert outcome.status == "failed"
    assert "free space" in outcome.reason
    assert names(small_disk) == {"summary.csv"}
    assert list(read_summary(small_disk / "summary.csv")) == ["a"]


def test_full_disk_is_found_before_any_slide_is_read(model: SlideModel, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(120 * 1024))
    with pytest.raises(OutputError, match=r"No space left.*free space"):
        run_slides([SlideJob("a", Path("never-read"))], model, RunSettings(small_disk))
    assert names(small_disk) == {"ballast"}


def test_output_below_a_file_is_found_before_any_slide_is_read(model: SlideModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another --out"):
        run_slides([SlideJob("a", Path("never-read"))], model, RunSettings(tmp_path / "file" / "out"))


@pytest.mark.parametrize("how", ["replaced", "written to", "removed"])
def test_slide_that_changes_while_it_runs_fails_and_keeps_nothing(
    model: SlideModel, slide: Path, settings: RunSettings, tmp_path: Path, how: str
) -> None:
    changing = tmp_path / "a.tiff"
    changing.write_bytes(slide.read_bytes())

    def change() -> None:
        if how == "replaced":
            (tmp_path / "b").write_bytes(slide.read_bytes())
            (tmp_path / "b").replace(changing)
        elif how == "written to":
            with changing.open("ab") as file:
                file.write(b"more")
        else:
            changing.unlink(missing_ok=True)

    jobs = [SlideJob("a", changing), SlideJob("b", slide)]
    outcomes = run_slides(jobs, model, settings, Watch(settings.out_dir, "a", change))
    assert statuses(outcomes) == {"a": "failed", "b": "ok"}
    assert "must stay as it is while it runs" in outcomes[0].reason
    assert "was replaced, removed or written to" in outcomes[0].reason
    assert names(settings.out_dir) == {"b", "summary.csv"}
    changing.write_bytes(slide.read_bytes())
    assert statuses(run_slides(jobs, model, settings)) == {"a": "ok", "b": "skipped"}


def test_state_of_a_mirax_slide_is_that_of_its_folder_and_of_no_other_kind(tmp_path: Path) -> None:
    for suffix in (".mrxs", ".svs"):
        slide, folder = tmp_path / f"a{suffix}", tmp_path / "a"
        slide.touch()
        folder.mkdir(exist_ok=True)
        state = FileState.of(slide)
        state.check()
        (folder / f"Data{suffix}").touch()
        if suffix == ".mrxs":
            with pytest.raises(SlideError, match=r"a.mrxs, which was .* \(Data.mrxs in its folder\); .*run it again"):
                state.check()
        else:
            state.check()  # such a folder may hold the outputs
