"""Whether all processes of a group have ended."""

from __future__ import annotations

import os
import time


def group_is_gone(group: int, within_s: float = 60) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
