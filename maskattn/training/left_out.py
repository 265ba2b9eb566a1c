"""The slides that take no part in a training, with the reasons: ``left_out.csv``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from maskattn.files import replacing

__all__ = ["write_left_out"]


def write_left_out(out: Path, left_out: Mapping[str, str]) -> Path:
    """Write the table and return its path.

    Args:
        out: the folder of the run.
        left_out: slide → reason.

    Raises:
        OSError: the table cannot be written.
    """
    path = out / "left_out.csv"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["slide_id", "reason"])
        writer.writerows(left_out.items())
    return path
