"""Runs over remote slides: fetched ahead, removed after use, skipped when finished; in folders and in tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fleet_runs import run_quickly
from runs import statuses
from slide_server import SlideServer, be_quick, left_in, serving
from small_slides import small_model, tissue_image, write_slide
from typer.testing import CliRunner

from maskattn.cli.app import app
from maskattn.errors import ManifestError
from maskattn.nn import TileEncoder, VisionTransformer
from maskattn.nn.encoders import EncoderCard
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.extraction import extract_slides
from maskattn.slide.fleet.sharing import Sharing
from maskattn.slide.manifest import SlideJob, collect_jobs, read_manifest
from maskattn.slide.manifest.remote_slides import refuse_remote
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.prediction import SlideOutcome, read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.remote import CacheSettings
from maskattn.slide.run import run_slides

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SlideServer]:
    be_quick(monkeypatch)
    with serving() as found:
        for seed, name in enumerate("abc"):
            slide = write_slide(tmp_path / "made.tif", tissue_image(seed=seed))
            found.files[f"/s/{name}.tif"] = slide.read_bytes()
        yield found


def run_at(server: SlideServer, tmp_path: Path) -> list[SlideOutcome]:
    settings = RunSettings(tmp_path / "out", cache_dir=tmp_path / "cache", check=False)
    outcomes = run_slides(collect_jobs([f"{server.url}/s/"]), small_model(), settings)
    assert left_in(tmp_path / "cache") == []
    return outcomes


def run_quickly_at(
    server: SlideServer, tmp_path: Path, run: Callable[[SlideJob], None], limit: int | None = None
) -> list[SlideOutcome]:
    """The same without a model."""
    jobs = collect_jobs([f"{server.url}/s/"])
    outcomes = run_quickly(tmp_path / "out", jobs, Sharing(limit=limit), run, CacheSettings(tmp_path / "cache"))
    assert left_in(tmp_path / "cache") == []
    return outcomes


def test_remote_slides_are_run_as_local_ones_and_not_fetched_again_unless_they_are_replaced(server, tmp_path):
    server.files["/s/c%20d.tif"] = server.files.pop("/s/c.tif")
    del server.files["/s/a.tif"]
    server.files["/s/readme.txt"] = b"text"
    notes: list[str] = []
    assert [job.slide_id for job in collect_jobs([f"{server.url}/s/"], notes.append)] == ["b", "c d"]
    assert notes == [f"in {server.url}/s/, passed over 1 .txt"]
    assert statuses(run_at(server, tmp_path)) == {"b": "ok", "c d": "ok"}
    local = tmp_path / "b.tif"
    local.write_bytes(server.files["/s/b.tif"])
    (there,) = run_slides(collect_jobs([local]), small_model(), RunSettings(tmp_path / "local", check=False))
    remote = read_prediction(tmp_path / "out" / "b" / "prediction.json")
    assert there.prediction is not None
    assert (remote.logits, remote.counts) == (there.prediction.logits, there.prediction.counts)
    assert (remote.slide.path, remote.slide.bytes) == (f"{server.url}/s/b.tif", local.stat().st_size)
    assert remote.slide.etag
    assert there.prediction.slide.etag == ""
    assert [server.got(f"/s/{name}.tif") for name in ("b", "c%20d")] == [1, 1]
    changed = bytearray(server.files["/s/b.tif"])
    changed[-1] ^= 1  # the same size: its ETag alone tells
    server.files["/s/b.tif"] = bytes(changed)
    outcomes = run_at(server, tmp_path)
    assert [server.got(f"/s/{name}.tif") for name in ("b", "c%20d")] == [1, 1]
    assert statuses(outcomes) == {"b": "failed", "c d": "skipped"}
    assert "must have been run as asked, got slide ETag" in outcomes[0].reason


def test_features_of_remote_slides_and_masks_are_extracted_once(server, tmp_path):
    mask = np.zeros((42, 56), np.uint8)
    mask[10:30, 10:40] = 1
    cv2.imwrite(str(tmp_path / "a.png"), mask)
    server.files["/m/a.png"] = (tmp_path / "a.png").read_bytes()
    manifest = tmp_path / "slides.csv"
    manifest.write_text(f"slide_id,slide_path,mask_path\na,{server.url}/s/a.tif,{server.url}/m/a.png\n")
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=64, embed_dim=24, depth=2, num_heads=2).eval()
    encoder = TileEncoder(vit, EncoderCard("small", "token", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 64, 64, 1.0))
    for status in ("ok", "skipped"):
        settings = ExtractSettings(tmp_path / "out", cache_dir=tmp_path / "cache")
        (outcome,) = extract_slides(collect_jobs([manifest]), encoder, settings)
        assert (outcome.status, outcome.reason) in {("ok", ""), ("skipped", "finished by an earlier run")}
        assert outcome.status == status
        assert outcome.record is not None
        assert outcome.record.slide.path == f"{server.url}/s/a.tif"
        assert outcome.record.slide.etag
        assert outcome.record.settings["mask"] == "a.png"
    assert (server.got("/s/a.tif"), server.got("/m/a.png")) == (1, 1)
    assert left_in(tmp_path / "cache") == []


def test_the_next_slide_is_fetched_while_the_present_one_runs_and_each_is_removed_after_use(server, tmp_path):
    ahead: list[int] = []
    copies: list[Path] = []

    def wait_for_the_next(job: SlideJob) -> None:
        assert job.path.read_bytes() == server.files[f"/s/{job.slide_id}.tif"]
        assert not any(path.exists() for path in copies)
        copies.append(job.path)
        until = time.monotonic() + 10
        while job.slide_id == "a" and not server.got("/s/b.tif") and time.monotonic() < until:
            time.sleep(0.01)
        ahead.append(server.got("/s/b.tif"))
        assert job.slide_id != "a" or server.got("/s/c.tif") == 0

    outcomes = run_quickly_at(server, tmp_path, wait_for_the_next)
    assert ahead[0] == 1
    assert [server.got(f"/s/{name}.tif") for name in "abc"] == [1, 1, 1]
    assert statuses(outcomes) == {"a": "ok", "b": "ok", "c": "ok"}


def test_a_slide_that_cannot_be_fetched_or_read_fails_alone_and_is_named_by_its_url(server, tmp_path):
    server.files["/s/b.tif"] = b"no slide"
    server.before_end = lambda path: server.files.pop("/s/a.tif", None) and None  # a vanishes while it is copied

    def read(job: SlideJob) -> None:
        with SlideReader(job.path):
            pass

    outcomes = run_quickly_at(server, tmp_path, read)
    assert statuses(outcomes) == {"a": "failed", "b": "failed", "c": "ok"}
    assert f"got {server.url}/s/a.tif, which does not exist" in outcomes[0].reason
    assert f"{server.url}/s/b.tif" in outcomes[1].reason
    assert str(tmp_path / "cache") not in outcomes[1].reason


def test_with_a_limit_nothing_is_fetched_that_is_left_to_others(server, tmp_path):
    assert len(run_quickly_at(server, tmp_path, lambda job: time.sleep(0.2), limit=1)) == 1
    assert [server.got(f"/s/{name}.tif") for name in "abc"] == [1, 0, 0]


def test_what_an_earlier_run_finished_is_not_fetched_ahead(server, tmp_path):
    run_quickly_at(server, tmp_path, lambda job: None, limit=1)
    shutil.move(tmp_path / "out" / "a", tmp_path / "out" / "b")
    run_quickly_at(server, tmp_path, lambda job: time.sleep(0.2))
    assert [server.got(f"/s/{name}.tif") for name in "abc"] == [2, 0, 1]


def test_slides_on_disks_are_run_where_they_are(tmp_path):
    seen: list[Path] = []
    jobs = [SlideJob(name, tmp_path / f"{name}.svs") for name in "ab"]
    run_quickly(tmp_path / "out", jobs, Sharing(), lambda job: seen.append(job.path))
    assert seen == [tmp_path / "a.svs", tmp_path / "b.svs"]


def test_a_manifest_names_slides_and_masks_by_url(server, tmp_path):
    manifest = tmp_path / "slides.csv"
    manifest.write_text(
        "slide_id,slide_path,mask_path\n"
        f"one,{server.url}/s/a.tif,{server.url}/m/a.png\n"
        f"two,{server.url}/s/b.vms,\n"
        "three,s3://bucket/dir/c.svs,\n"
    )
    one, two, three = read_manifest(manifest)
    assert one.problem is None
    assert one.mask_origin is not None
    assert (one.where, one.mask_where) == (f"{server.url}/s/a.tif", f"{server.url}/m/a.png")
    assert "one of several files" in str(two.problem)
    assert (three.where, three.path.name) == ("s3://bucket/dir/c.svs", "c.svs")
    (again,) = collect_jobs([f"{server.url}/s/a.tif", f"{server.url}/s/a.tif"])
    assert again.slide_id == "a"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{}/none/", "which does not exist"),
        ("s3://bucket/*.svs", "a glob must be one of local files"),
        ("{}/s/list.csv", "a manifest must be on a disk"),
    ],
)
def test_a_url_that_names_no_slides_is_refused(server, source, words):
    with pytest.raises(ManifestError, match=words):
        collect_jobs([source.format(server.url)])


def test_commands_that_read_slides_at_any_time_refuse_urls():
    with pytest.raises(ManifestError, match="maskattn train needs slides and masks on a disk"):
        refuse_remote(collect_jobs(["https://host/a.svs"]), "train")


def test_info_and_tissue_take_urls(server, tmp_path):
    url, cache = f"{server.url}/s/a.tif", ["--cache-dir", str(tmp_path / "cache")]
    runner = CliRunner()
    facts = json.loads(runner.invoke(app, ["info", url, "--json", *cache]).stdout)
    assert (facts["path"], facts["bytes"]) == (url, len(server.files["/s/a.tif"]))
    found = runner.invoke(app, ["tissue", url, "--out", str(tmp_path / "a.png"), *cache])
    assert json.loads(found.stdout)["slide"] == url
    assert (tmp_path / "a.png").exists()
    missing = runner.invoke(app, ["info", f"{server.url}/s/none.tif", *cache])
    assert missing.exit_code
    assert "which does not exist" in missing.stderr
    assert left_in(tmp_path / "cache") == []


def test_neither_fsspec_nor_torch_is_loaded_for_slides_on_disks(tmp_path):
    slide = write_slide(tmp_path / "a.tif")
    code = f"""
import sys
sys.argv = ["maskattn", "info", {str(slide)!r}]
from maskattn.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
import maskattn.slide.remote
print("loaded", *(name for name in ("fsspec", "aiohttp", "torch") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded", done.stderr
