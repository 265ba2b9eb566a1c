"""A cache of results, image by image, so that an interrupted run of the evidence resumes.

Each file holds the rows of one part of the evidence, under a digest of the sources that compute them and of everything
else they depend on. A row maps each measure to its value for each method. Seconds are processor time, children
included.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from maskattn.files import replacing

__all__ = ["Progress", "processor_seconds"]

Measures = dict[str, dict[str, float]]
_HERE = Path(__file__).resolve().parent
_SOURCES = (
    *(f"bench/evidence/real_{name}.py" for name in ("images", "judging", "probes", "rows", "slide", "weights")),
    "maskattn/explain/*.py",
)


def processor_seconds() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Progress:
    """The cached rows of one part of the evidence.

    Args:
        folder: folder of the cache.
        part: the name of the part.
        depends_on: everything apart from the sources that the rows depend on, as a string.
    """

    def __init__(self, folder: Path, part: str, depends_on: str) -> None:
        digest = hashlib.sha1(f"{part} {depends_on}".encode())
        for pattern in _SOURCES:
            for path in sorted(_HERE.parents[1].glob(pattern)):
                digest.update(path.read_bytes())
        self.path = folder / f"judged_{digest.hexdigest()[:16]}.json"
        kept = json.loads(self.path.read_text()) if self.path.exists() else {"rows": {}, "seconds": 0.0}
        self.rows: dict[str, Measures] = kept["rows"]
        self.seconds: float = kept["seconds"]

    def row(self, key: str, make: Callable[[], Measures]) -> Measures:
        """Return the measures of one image, computing them if they are not cached."""
        if key not in self.rows:
            start = processor_seconds()
            self.rows[key] = make()
            self.seconds += processor_seconds() - start
            self._keep()
        return self.rows[key]

    def spent(self, seconds: float) -> None:
        """Add the processor seconds of work that is not part of a row."""
        self.seconds += seconds
        self._keep()

    def _keep(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as path:
            path.write_text(json.dumps({"rows": self.rows, "seconds": self.seconds}))
