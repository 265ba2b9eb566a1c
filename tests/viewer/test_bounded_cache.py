"""The cache of the viewer: what is asked for least goes, and nothing is made twice at once."""

from __future__ import annotations

import threading
import time

import pytest

from maskattn.viewer.bounded_cache import BoundedCache


def test_what_was_asked_for_longest_ago_goes_first_and_is_told() -> None:
    dropped: list[str] = []
    cache = BoundedCache(6, len, dropped.append)
    for key in ("aa", "bb", "cc"):
        cache.get(key, lambda key=key: key)
    assert cache.get("aa", lambda: "made anew") == "aa"
    cache.get("dd", lambda: "dd")
    assert dropped == ["bb"]
    cache.get("long", lambda: "x" * 100)
    assert cache.get("long", lambda: "made anew") == "x" * 100
    cache.clear()
    assert sorted(dropped) == sorted(["aa", "bb", "cc", "dd", "x" * 100])


def test_two_threads_that_ask_at_once_share_one_making() -> None:
    cache: BoundedCache[int] = BoundedCache(10, lambda value: 1)
    made, found = [], []

    def make() -> int:
        made.append(1)
        time.sleep(0.05)
        return 7

    threads = [threading.Thread(target=lambda: found.append(cache.get("key", make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [7] * 8
    assert made == [1]


def test_a_making_that_fails_is_tried_again() -> None:
    cache: BoundedCache[int] = BoundedCache(10, lambda value: 1)
    with pytest.raises(OSError, match="first"):
        cache.get("key", _fail)
    assert cache.get("key", lambda: 3) == 3


def _fail() -> int:
    raise OSError("first")
