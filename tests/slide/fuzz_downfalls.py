"""A task that ends as it is told, for the tests of ``fuzz_pool.py``; light, because each new process loads it anew."""

from __future__ import annotations

import os
import time


def end_as_told(way: str) -> str:
    if way == "abort":
        os.abort()
    if way == "exit":
        os._exit(3)
    while way == "work":
        pass
    if way == "wait":
        time.sleep(1000)
    return f"returned {way}"
