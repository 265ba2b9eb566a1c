"""Slides in S3, as moto's server plays it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slide_server import be_quick, left_in
from tiffs import draw, write_ome

from maskattn.slide.manifest import collect_jobs
from maskattn.slide.placeholders import is_placeholder
from maskattn.slide.reader import SlideReader
from maskattn.slide.remote import CacheSettings, Copies, fetch
from maskattn.slide.remote import transfer as transfers
from maskattn.slide.remote.files import look_up
from maskattn.slide.remote.range_requests import StoreStopped
from maskattn.slide.remote.ranges import RangeFile, place_remote
from maskattn.slide.remote.stores import StoreError

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("flask")

DATA = os.urandom(100_000)
SERVER = """
from werkzeug.serving import make_server
from moto.server import DomainDispatcherApplication, create_backend_app
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with a slide, and the way to it in the environment, as users give it."""
    be_quick(monkeypatch)
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "word"), ("ENDPOINT_URL", endpoint)):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem(use_listings_cache=False)
    if not store.exists("slides"):
        store.mkdir("slides")
    store.pipe_file("slides/dir/a.svs", DATA)
    return store


def copied(cache: Path) -> bytes:
    (job,) = collect_jobs(["s3://slides/dir/"])
    with Copies(CacheSettings(cache)) as copies, copies.local(job) as here:
        return here.path.read_bytes()


def test_slides_of_a_bucket_are_listed_with_sizes_and_copied(bucket, tmp_path):
    bucket.pipe_file("slides/dir/below/b.svs", b"b")
    notes: list[str] = []
    (job,) = collect_jobs(["s3://slides/dir/"], notes.append)
    assert notes == ["in s3://slides/dir/, passed over 1 folder"]
    assert (job.slide_id, job.where, job.bytes) == ("a", "s3://slides/dir/a.svs", len(DATA))
    assert job.etag == hashlib.md5(DATA).hexdigest()
    assert copied(tmp_path) == DATA
    assert left_in(tmp_path) == []


def test_a_transfer_whose_checksum_is_wrong_once_is_made_again(bucket, tmp_path, monkeypatch):
    opened: list[int] = []
    open_at = transfers.open_at

    def open_damaged(url: str, size: int | None, offset: int, block_bytes: int) -> tuple[Any, int]:
        opened.append(offset)
        file, start = open_at(url, size, offset, block_bytes)
        if len(opened) == 1:
            read = file.read
            file.read = lambda count: bytes(255 - byte for byte in read(count))
        return file, start

    monkeypatch.setattr(transfers, "open_at", open_damaged)
    assert copied(tmp_path) == DATA
    assert opened == [0, 0]


def test_an_etag_that_is_no_checksum_is_taken_for_none_when_two_copies_agree(bucket, tmp_path, monkeypatch):
    look_up = transfers.look_up

    def with_other_etag(url: str) -> Any:
        found = look_up(url)
        return type(found)(url, found.bytes, "0" * 32, "0" * 32, md5_likely=True)

    monkeypatch.setattr(transfers, "look_up", with_other_etag)
    monkeypatch.setattr(fetch, "look_up_slide", with_other_etag)
    assert copied(tmp_path) == DATA


def test_what_a_bucket_does_not_have_or_does_not_show_is_said(bucket, endpoint, tmp_path, monkeypatch):
    with Copies(CacheSettings(tmp_path)) as copies:
        (job,) = collect_jobs(["s3://slides/dir/none.svs"])
        with pytest.raises(StoreError, match=r"s3://slides/dir/none\.svs, which does not exist"):
            copies.identified(job)
        (job,) = collect_jobs(["s3://slides/dir"])
        with pytest.raises(StoreError, match="end its URL with / to list it"):
            copies.identified(job)


def test_parts_of_a_slide_in_a_bucket_are_read_conditionally(bucket, tmp_path):
    data = os.urandom(5 << 20)
    bucket.pipe_file("slides/parts/a.bin", data)
    remote = look_up("s3://slides/parts/a.bin")
    place_remote(tmp_path / "a.bin", remote)
    with RangeFile(tmp_path / "a.bin") as file:
        file.seek(100_000)
        assert file.read(2 << 20) == data[100_000:][: 2 << 20]
        bucket.pipe_file("slides/parts/a.bin", data[:-1] + b"x")
        file.seek(4 << 20)
        with pytest.raises(StoreStopped, match=r"must stay as it is while it runs, got s3://slides/parts/a\.bin"):
            file.read(1)
    with RangeFile(tmp_path / "a.bin") as file, pytest.raises(StoreStopped, match="must stay as it is"):
        file.read(1)  # whoever opens it only now
    bucket.rm("slides/parts/a.bin")
    with RangeFile(tmp_path / "a.bin") as file, pytest.raises(StoreStopped, match="which does not exist"):
        file.read(1)


def test_a_slide_in_a_bucket_is_read_in_parts(bucket, tmp_path):
    path = tmp_path / "a.ome.tif"
    write_ome(path, draw(3000, 2400), compression=None)
    bucket.put_file(str(path), "slides/parts/a.ome.tif")
    (job,) = collect_jobs(["s3://slides/parts/"])
    with Copies(CacheSettings(tmp_path / "cache")) as copies, copies.local(job) as here:
        assert is_placeholder(here.path)
        with SlideReader(here.path, isolated=True) as reader, SlideReader(path) as local:
            assert np.array_equal(reader.thumbnail(600), local.thumbnail(600))
    assert left_in(tmp_path / "cache") == []


def test_a_dicom_series_in_a_bucket_is_one_slide_and_is_read_in_parts(bucket, tmp_path, monkeypatch):
    pytest.importorskip("wsidicom")
    sources = pytest.importorskip("fuzz_sources")
    monkeypatch.setattr(fetch, "_SMALL_BYTES", 0)
    paths = sources.DRAWINGS["DICOM uncompressed"](tmp_path, draw(*sources.SIZE))
    for path in paths:
        bucket.put_file(str(path), f"slides/CMU-1/{path.name}")
    (job,) = collect_jobs(["s3://slides/CMU-1/"])
    assert job.slide_id == "CMU-1"
    with Copies(CacheSettings(tmp_path / "cache")) as copies, copies.local(copies.identified(job)) as here:
        assert is_placeholder(here.path)
        with SlideReader(here.path, isolated=True) as reader, SlideReader(paths[0]) as local:
            assert np.array_equal(reader.thumbnail(400), local.thumbnail(400))
            assert reader.info.spacing_um == local.info.spacing_um
    assert left_in(tmp_path / "cache") == []
