"""Slides whose parts are read where they lie: equal to copies, far fewer bytes, and stores that stop giving them."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import statuses
from slide_server import SlideServer, be_quick, left_in, serving
from small_slides import small_model, tissue_image, write_slide
from tiffs import draw, write_ome
from typer.testing import CliRunner

from maskattn.cli.app import app
from maskattn.errors import SlideError
from maskattn.nn import TileEncoder, VisionTransformer
from maskattn.nn.encoders import EncoderCard
from maskattn.slide.extract_request import ExtractSettings
from maskattn.slide.extraction import extract_slides
from maskattn.slide.manifest import SlideJob, collect_jobs
from maskattn.slide.pipeline import RunSettings
from maskattn.slide.placeholders import is_placeholder
from maskattn.slide.prediction import read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.remote import CacheSettings, Copies, fetch, locate, ranges
from maskattn.slide.remote.cache import SlideCache
from maskattn.slide.remote.files import look_up
from maskattn.slide.remote.range_requests import CopyNeeded, StoreStopped
from maskattn.slide.remote.ranges import RangeFile, place_remote
from maskattn.slide.run import run_slides
from maskattn.slide.unchanged import FileState

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

SPACING = {"PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}
MIB = 1 << 20


@pytest.fixture(scope="module")
def ome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """31 MB, a hundredth of them tissue."""
    path = tmp_path_factory.mktemp("ome") / "a.ome.tif"
    write_ome(path, tissue_image((2048, 4096)), levels=3, compression=None, metadata=SPACING)
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlideServer]:
    be_quick(monkeypatch)
    with serving() as found:
        yield found


def job_at(url: str) -> SlideJob:
    path, origin = locate(url)
    return SlideJob(path.stem, path, origin=origin)


def placed(server: SlideServer, folder: Path, data: bytes) -> Path:
    """A placeholder of a file with these bytes."""
    server.files["/a.bin"] = data
    place_remote(folder / "a.bin", look_up(f"{server.url}/a.bin"))
    return folder / "a.bin"


def assert_same_outputs(one: Path, other: Path) -> None:
    """Two folders have the same files; those that tell where the slide lay are left out."""
    names = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    assert names[0] == names[1]
    told = {name for name in names[0] if name.suffix in (".json", ".csv", ".html")}
    assert names[0] - told
    for name in names[0] - told:
        # Some name the folder; the names of both are of the same length.
        assert (one / name).read_bytes().replace(bytes(one), bytes(other)) == (other / name).read_bytes(), name


def test_a_range_file_reads_what_a_file_reads_and_holds_64_blocks_at_most(server, tmp_path, monkeypatch):
    block = 1 << 14
    monkeypatch.setattr(ranges, "_BLOCK_BYTES", block)
    data = os.urandom(80 * block + 12_345)
    path = placed(server, tmp_path, data)
    plain, draw_ = io.BytesIO(data), random.Random(0)
    assert path.stat().st_size == len(data)
    with RangeFile(path) as file:
        tracemalloc.start()
        for _ in range(400):
            at, count = draw_.randrange(len(data) + 100), draw_.choice((0, 1, 5, 700, 9_000, 3 * block))
            how = draw_.choice(((at, os.SEEK_SET), (-at % 5_000, os.SEEK_CUR), (-draw_.randrange(99), os.SEEK_END)))
            assert file.seek(*how) == plain.seek(*how) == file.tell()
            assert file.read(count) == plain.read(count)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert 60 * block < held < 70 * block
        file.seek(-5, os.SEEK_END)
        buffer = bytearray(9)
        assert (file.readinto(buffer), bytes(buffer)) == (5, data[-5:] + bytes(4))
        assert (file.read(3), file.readall()) == (b"", b"")
        with pytest.raises(ValueError, match="a position must be 0 or more"):
            file.seek(-1)


def test_blocks_that_are_read_one_after_another_are_fetched_together(server, tmp_path):
    data = os.urandom(32 * MIB)
    with RangeFile(placed(server, tmp_path, data)) as file:
        for at in range(0, 11 * MIB, MIB // 8):  # two places in turn, as rows of tiles are read
            for place in (0, 16 * MIB):
                file.seek(place + at)
                assert file.read(MIB // 8) == data[place + at :][: MIB // 8]
        # 1, 2, 4 and 4 blocks at each of two places.
        assert (server.parts["/a.bin"], server.sent) == (8, 22 * MIB)
        file.seek(16 * MIB)
        file.read(11 * MIB)
        assert server.sent == 22 * MIB
        file.seek(11 * MIB)
        file.read(5 * MIB)
        assert (server.parts["/a.bin"], server.sent) == (9, 27 * MIB)


@pytest.mark.parametrize(("fault", "tries"), [("dies", 4), ("short", 4), ("whole", 1)])
def test_a_part_that_does_not_come_is_asked_for_again_and_then_ends_all_reading(server, tmp_path, fault, tries):
    data = os.urandom(3 * MIB)
    server.on_part = lambda path, number: fault if number in (2, 3) and fault != "whole" else ""
    with RangeFile(placed(server, tmp_path, data)) as file:
        assert file.read(2 * MIB) == data[: 2 * MIB]
        assert file.read(MIB) == data[2 * MIB :]
    server.parts.clear()
    server.on_part = lambda path, number: fault if number > 1 else ""
    with RangeFile(tmp_path / "a.bin") as file:
        file.read(MIB)
        words = {"dies": "must answer", "short": "whole of a part.*tried 4", "whole": "with that part, got status 200"}
        with pytest.raises(CopyNeeded if fault == "whole" else StoreStopped, match=words[fault]) as raised:
            file.read(1)
        server.on_part = lambda path, number: ""
        with pytest.raises(StoreStopped) as again:
            file.check()
        assert again.value is raised.value
    # A request on a connection that was dead from the start is repeated by aiohttp itself.
    assert server.parts["/a.bin"] in ((1 + tries, 1 + 2 * tries) if fault == "dies" else (1 + tries,))


def test_parts_of_two_versions_are_never_mixed(server, tmp_path):
    data = os.urandom(3 * MIB)
    path = placed(server, tmp_path, data)
    state = FileState.of(path)
    state.check()
    with RangeFile(path) as file:
        file.read(MIB)
        server.files["/a.bin"] = data[:-1] + b"x"  # its ETag alone tells
        with pytest.raises(StoreStopped, match=rf"must stay as it is while it runs, got {server.url}/a.bin"):
            file.read(1)
    with pytest.raises(SlideError, match="which was replaced, removed or written to"):
        state.check()
    del server.files["/a.bin"]
    with pytest.raises(SlideError, match="which does not exist"):
        state.check()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_reads_few_parts_and_gives_what_a_copy_gives(server, tmp_path, ome, workers):
    server.files["/s/a.ome.tif"] = ome.read_bytes()
    settings = {"workers": workers, "check": False, "tokens": True, "geojson": True}
    outcomes = []
    for out, source in (("parts", f"{server.url}/s/"), ("local", ome)):
        request = RunSettings(tmp_path / out, cache_dir=tmp_path / "cache", **settings)
        outcomes += run_slides(collect_jobs([source]), small_model(), request)
    assert [outcome.reason for outcome in outcomes] == ["", ""]
    assert_same_outputs(tmp_path / "parts" / "a", tmp_path / "local" / "a")
    remote, local = (read_prediction(tmp_path / out / "a" / "prediction.json") for out in ("parts", "local"))
    assert (remote.logits, remote.counts, remote.slide.bytes) == (local.logits, local.counts, local.slide.bytes)
    assert remote.slide.reader == local.slide.reader
    assert remote.slide.etag
    assert server.sent < ome.stat().st_size / 2
    assert server.parts["/s/a.ome.tif"] == server.got("/s/a.ome.tif")
    assert left_in(tmp_path / "cache") == []


def test_features_of_parts_are_those_of_a_copy(server, tmp_path, ome):
    server.files["/s/a.ome.tif"] = ome.read_bytes()
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=64, embed_dim=24, depth=2, num_heads=2).eval()
    encoder = TileEncoder(vit, EncoderCard("small", "token", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 64, 64, 1.0))
    for out, source, whole in (
        ("parts", f"{server.url}/s/", False),
        ("whole", f"{server.url}/s/", True),
        ("local", ome, False),
    ):
        request = ExtractSettings(tmp_path / out, cache_dir=tmp_path / "cache", copy_whole=whole)
        sent = server.sent
        (outcome,) = extract_slides(collect_jobs([source]), encoder, request)
        assert (outcome.status, outcome.reason) == ("ok", "")
        moved = server.sent - sent
        assert moved == ome.stat().st_size if whole else moved < ome.stat().st_size / 2
    assert_same_outputs(tmp_path / "parts", tmp_path / "local")
    assert_same_outputs(tmp_path / "whole", tmp_path / "local")
    assert left_in(tmp_path / "cache") == []


def test_a_slide_whose_store_fails_in_the_middle_fails_alone_with_the_reason(server, tmp_path, ome):
    data = ome.read_bytes()
    faults = {"a": "dies", "b": "whole", "c": "replaced", "d": ""}
    for name in faults:
        server.files[f"/s/{name}.ome.tif"] = data
    with Copies(CacheSettings(tmp_path / "cache")) as copies, copies.local(job_at(f"{server.url}/s/d.ome.tif")):
        opening = server.parts["/s/d.ome.tif"]

    def fault(path: str, number: int) -> str:
        kind = faults[Path(path).name[0]] if number > opening else ""
        if kind == "replaced":
            server.files[path] = data[:-1] + b"x"
        return kind

    server.on_part = fault
    server.parts.clear()
    manifest = tmp_path / "slides.csv"
    rows = [f"{name},{server.url.replace('//', '//me:word@')}/s/{name}.ome.tif?sign=secret" for name in faults]
    manifest.write_text("\n".join(["slide_id,slide_path", *rows]))
    request = RunSettings(tmp_path / "out", cache_dir=tmp_path / "cache", check=False)
    outcomes = run_slides(collect_jobs([manifest]), small_model(), request)
    assert statuses(outcomes) == {"a": "failed", "b": "failed", "c": "failed", "d": "ok"}
    reasons = [outcome.reason for outcome in outcomes]
    assert "a URL must answer" in reasons[0]
    assert "with that part, got status 200" in reasons[1]
    assert "a slide must stay as it is while it runs" in reasons[2]
    for name, reason in zip("abc", reasons, strict=False):
        assert f"{server.url}/s/{name}.ome.tif" in reason
        assert "damaged" not in reason
        assert not (tmp_path / "out" / name).exists()
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"secret" not in written + repr(reasons).encode()
    assert b"word@" not in written + repr(reasons).encode()
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("why", ["no ranges", "no TIFF for tifffile", "small", "asked", "no TIFF at all"])
def test_a_slide_that_cannot_be_read_in_parts_is_copied(server, tmp_path, ome, monkeypatch, why):
    path, small = "/s/a.tif", why in ("no TIFF for tifffile", "small", "no TIFF at all")
    plain = write_slide(tmp_path / "plain.tif").read_bytes()
    server.files[path] = os.urandom(MIB) if why == "no TIFF at all" else plain if small else ome.read_bytes()
    server.ranges = why != "no ranges"
    if small and why != "small":
        monkeypatch.setattr(fetch, "_SMALL_BYTES", 0)
    cache = CacheSettings(tmp_path / "cache", copy_whole=why == "asked")
    with Copies(cache) as copies, copies.local(job_at(server.url + path)) as here:
        assert not is_placeholder(here.path)
        assert here.path.read_bytes() == server.files[path]
    assert left_in(tmp_path / "cache") == []


def test_a_slide_of_a_kind_that_is_not_read_is_refused_by_its_url_without_a_copy(server, tmp_path):
    path = tmp_path / "grey.ome.tif"
    write_ome(path, np.repeat(draw(3000, 2500)[..., :1], 3, 2), layout="pages", compression=None, levels=1)
    data = server.files["/s/a.tif"] = path.read_bytes()
    job = job_at(f"{server.url}/s/a.tif")
    cache = CacheSettings(tmp_path / "cache", series=7)
    with (
        pytest.raises(SlideError, match=rf"got path='{server.url}/s/a.tif', which is series 7 of a file that has 1"),
        Copies(cache) as copies,
        copies.local(job),
    ):
        pass
    assert server.sent < len(data) / 2
    assert left_in(tmp_path / "cache") == []


def test_a_slide_larger_than_the_cache_is_read_in_parts_and_its_note_is_private(server, tmp_path, ome):
    server.files["/s/a.ome.tif"] = ome.read_bytes()
    job = job_at(f"{server.url}/s/a.ome.tif?sign=secret")
    with Copies(CacheSettings(tmp_path, gb=10e-3)) as copies, copies.local(job) as here:
        assert is_placeholder(here.path)
        assert sum(path.stat().st_blocks * 512 for path in left_in(tmp_path) if path.is_file()) < 8 * MIB
        noted = [path for path in left_in(tmp_path) if path.is_file() and b"secret" in path.read_bytes()]
        assert len(noted) == 1
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in noted)
        asked = len(server.asked)
        with SlideReader(here.path, isolated=True) as reader, SlideReader(ome) as local:
            assert reader.describe() | {"path": ""} == local.describe() | {"path": ""}
            assert len(server.asked) == asked  # what was read to open it is there
            assert np.array_equal(reader.thumbnail(500), local.thumbnail(500))
    assert left_in(tmp_path) == []


def test_info_and_tissue_read_some_mib_of_a_slide(server, tmp_path, ome):
    server.files["/s/a.ome.tif"] = ome.read_bytes()
    url, cache = f"{server.url}/s/a.ome.tif", ["--cache-dir", str(tmp_path / "cache")]
    facts = json.loads(CliRunner().invoke(app, ["info", url, "--json", *cache]).stdout)
    assert (facts["path"], facts["bytes"]) == (url, ome.stat().st_size)
    assert server.sent <= 5 * MIB
    server.sent = 0
    found = CliRunner().invoke(app, ["tissue", url, "--out", str(tmp_path / "a.png"), *cache])
    assert json.loads(found.stdout)["slide"] == url
    assert server.sent <= 9 * MIB
    assert left_in(tmp_path / "cache") == []


KILLED = """
import sys, time
from pathlib import Path
from maskattn.slide.manifest import SlideJob
from maskattn.slide.remote import CacheSettings, Copies, locate
path, origin = locate(sys.argv[2])
with Copies(CacheSettings(Path(sys.argv[1]))) as copies, copies.local(SlideJob("a", path, origin=origin)) as here:
    print(here.path, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_leaves_of_a_slide_in_parts_is_removed_by_the_next(server, tmp_path, ome):
    server.files["/s/a.ome.tif"] = ome.read_bytes()
    command = [sys.executable, "-c", KILLED, str(tmp_path), f"{server.url}/s/a.ome.tif"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        path = Path(killed.stdout.readline().strip())
        assert is_placeholder(path)
        killed.send_signal(signal.SIGKILL)
    with SlideCache(CacheSettings(tmp_path)):
        assert not path.parent.exists()
    assert left_in(tmp_path) == []


def test_a_silent_store_is_given_up_in_its_own_words(server, tmp_path, monkeypatch):
    from maskattn.slide.remote import range_requests

    path = placed(server, tmp_path, os.urandom(2 * MIB))
    monkeypatch.setattr(range_requests, "_GIVEN_UP_AFTER_S", 0.3)
    server.latency_s = 1.0
    with RangeFile(path) as file, pytest.raises(StoreStopped, match=r"got nothing for 0 s of http.*a\.bin"):
        file.read(1)
    server.latency_s = 0.0
