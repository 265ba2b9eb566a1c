"""What has been judged is kept, image by image, so that a run that was broken off goes on where it was.

A file holds the rows of one part of the evidence, under a digest of the sources that make them and of all that they
depend on; a row is a measure's value for each method. Seconds are of the processor, children among them.
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
    """Seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Progress:
    """The rows of a part.

    Args:
        folder: of the cache.
        part: its name.
        depends_on: what the rows depend on, beside the sources, in words and numbers.
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
        """The measures of one image, made where they are not kept."""
        if key not in self.rows:
            start = processor_seconds()
            self.rows[key] = make()
            self.seconds += processor_seconds() - start
            self._keep()
        return self.rows[key]

    def spent(self, seconds: float) -> None:
        """Count work that is no row, once."""
        self.seconds += seconds
        self._keep()

    def _keep(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as path:
            path.write_text(json.dumps({"rows": self.rows, "seconds": self.seconds}))
