"""Copies of remote slides: broken, stalled, replaced and damaged transfers, and the cache that processes share."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from slide_server import SlideServer, be_quick, left_in, serving

from maskattn.errors import SlideError
from maskattn.slide.manifest import SlideJob
from maskattn.slide.remote import CacheSettings, Copies, RemoteFile, locate
from maskattn.slide.remote.cache import SlideCache
from maskattn.slide.remote.stores import StoreError
from maskattn.slide.remote.transfer import TransferStopped

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

DATA = os.urandom(50_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlideServer]:
    be_quick(monkeypatch)
    with serving() as found:
        found.files["/s/a.svs"] = DATA
        yield found


def job_at(url: str) -> SlideJob:
    path, origin = locate(url)
    return SlideJob(path.stem, path, origin=origin)


def copied(server: SlideServer, cache: Path, path: str = "/s/a.svs") -> bytes:
    """The bytes that a run would read; the cache is empty afterwards."""
    with Copies(CacheSettings(cache)) as copies, copies.local(job_at(server.url + path)) as here:
        assert here.path.name == Path(path).name
        data = here.path.read_bytes()
    assert left_in(cache) == []
    return data


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_is_broken_off_goes_on_or_begins_again(server, tmp_path, ranges):
    server.ranges = ranges
    server.files["/s/a.svs"] = data = os.urandom(8 << 20)
    server.broken_after = [6 << 20, 1 << 20]
    assert copied(server, tmp_path / "cache") == data
    assert server.got("/s/a.svs") == 3
    # What came before a break need not come again where the server takes ranges; some of it may be lost on its way.
    assert server.sent < 12 << 20 if ranges else server.sent == 15 << 20


def test_a_transfer_that_always_ends_early_is_an_error_and_leaves_nothing(server, tmp_path):
    server.ranges = False
    server.broken_after = [100] * 10
    with pytest.raises(StoreError, match=r"/s/a\.svs.*tried 4 times"):
        copied(server, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_stalled_transfer_is_tried_again(server, tmp_path):
    server.stalled_after = [10_000]
    assert copied(server, tmp_path / "cache") == DATA
    assert server.got("/s/a.svs") == 2


def test_a_slide_that_is_replaced_while_it_is_copied_is_copied_anew(server, tmp_path):
    new = os.urandom(len(DATA))

    def replace_it(path: str) -> None:
        server.files[path] = new

    server.before_end = replace_it
    assert copied(server, tmp_path / "cache") == new


def test_a_copy_with_another_checksum_is_refused(server, tmp_path):
    server.md5["/s/a.svs"] = hashlib.md5(DATA).hexdigest()
    assert copied(server, tmp_path / "cache") == DATA
    server.md5["/s/a.svs"] = hashlib.md5(b"other").hexdigest()
    with pytest.raises(StoreError, match="must have the checksum that its store gives"):
        copied(server, tmp_path / "cache")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{}/s/none.svs", "which does not exist"),
        ("http://127.0.0.1:9/a.svs", "a URL must answer"),
        ("nosuch://b/a.svs", "a scheme that fsspec knows"),
        ("{}/s/a.vms", "one of several files"),
        ("simplecache::http://h/a.svs", "a chain of several"),
    ],
)
def test_a_url_that_cannot_be_read_says_why(server, tmp_path, url, words):
    with pytest.raises(StoreError, match=words), Copies(CacheSettings(tmp_path / "c")) as copies:
        copies.identified(SlideJob("a", Path("a.svs"), origin=RemoteFile(url.format(server.url))))


def test_the_query_of_a_web_address_is_neither_shown_nor_recorded(server, tmp_path):
    job = job_at(f"{server.url.replace('//', '//me:word@')}/s/a.svs?signature=secret")
    assert (job.slide_id, job.path.name) == ("a", "a.svs")
    assert "secret" not in job.where
    assert "word" not in job.where
    with Copies(CacheSettings(tmp_path / "cache")) as copies, pytest.raises(StoreError) as raised:
        copies.identified(job_at(f"{server.url}/s/none.svs?signature=secret"))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("package", "scheme"), [("fsspec", "s3"), ("s3fs", "s3"), ("gcsfs", "gs")])
def test_a_missing_package_is_named(monkeypatch, package, scheme):
    be_quick(monkeypatch)
    monkeypatch.setitem(sys.modules, package, None)
    if package != "fsspec":
        monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    with Copies(CacheSettings()) as copies, pytest.raises(StoreError, match="pip install") as raised:
        copies.identified(job_at(f"{scheme}://bucket/a.svs"))
    assert {"s3": "s3fs", "gs": "gcsfs"}[scheme] in str(raised.value)


def test_a_slide_larger_than_the_cache_is_refused_with_both_sizes(server, tmp_path):
    with (
        Copies(CacheSettings(tmp_path / "cache", gb=40e-6)) as copies,
        pytest.raises(SlideError, match=r"got 5e-05 GB of .*a\.svs for a cache of 4e-05 GB"),
        copies.local(job_at(f"{server.url}/s/a.svs")),
    ):
        pass
    assert server.got("/s/a.svs") == 0
    assert left_in(tmp_path / "cache") == []


def test_processes_share_the_room_and_remove_nothing_of_each_other(tmp_path, monkeypatch):
    be_quick(monkeypatch)
    stop = threading.Event()
    with SlideCache(CacheSettings(tmp_path, gb=1e-6)) as one, SlideCache(CacheSettings(tmp_path, gb=1e-6)) as other:
        first = one.make_room(600, "a", stop)
        (first / "a.svs").write_bytes(b"a")
        waiting = threading.Timer(0.2, one.release, (first,))
        waiting.start()
        began = time.monotonic()
        second = other.make_room(600, "b", stop)  # when the first is released
        assert time.monotonic() - began > 0.1
        (second / "b.svs").write_bytes(b"b")
        waiting.join()
        with SlideCache(CacheSettings(tmp_path, gb=1e-6)):
            pass
        one.clear_ended()
        assert (second / "b.svs").read_bytes() == b"b"
        stop.set()
        with pytest.raises(TransferStopped):
            one.make_room(600, "c", stop)
    assert left_in(tmp_path) == []


KILLED = """
import sys, threading, time
from pathlib import Path
from maskattn.slide.remote.cache import CacheSettings, SlideCache
with SlideCache(CacheSettings(Path(sys.argv[1]))) as cache:
    (cache.make_room(5, "a", threading.Event()) / ".a.svs.part").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "ready\n"
    with SlideCache(CacheSettings(tmp_path)):
        assert any(path.name == ".a.svs.part" for path in left_in(tmp_path))  # its owner lives
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    with SlideCache(CacheSettings(tmp_path)):
        assert not any(path.name == ".a.svs.part" for path in left_in(tmp_path))
    assert left_in(tmp_path) == []


def test_a_mirax_slide_is_copied_with_its_folder(server, tmp_path):
    server.files |= {"/m/x.mrxs": b"jpeg", "/m/x/Slidedat.ini": b"ini", "/m/x/Data0000.dat": b"pixels"}
    with Copies(CacheSettings(tmp_path / "cache")) as copies:
        job = copies.identified(job_at(f"{server.url}/m/x.mrxs"))
        with copies.local(job) as here:
            found = {path.name: path.read_bytes() for path in here.path.with_suffix("").iterdir()}
            assert here.etag == job.etag
        server.files["/m/x/Data0000.dat"] = b"others"
        assert copies.identified(job).etag != job.etag
    assert found == {"Slidedat.ini": b"ini", "Data0000.dat": b"pixels"}


def test_a_mask_is_copied_beside_its_slide_even_with_the_same_name(server, tmp_path):
    server.files["/m/a.svs"] = b"mask"
    path, origin = locate(f"{server.url}/m/a.svs")
    job = replace(job_at(f"{server.url}/s/a.svs"), mask_path=path, mask_origin=origin)
    with Copies(CacheSettings(tmp_path)) as copies, copies.local(job) as here:
        assert here.mask_path is not None
        assert (here.path.read_bytes(), here.mask_path.read_bytes()) == (DATA, b"mask")
