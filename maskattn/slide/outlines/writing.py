"""Write GeoJSON as QuPath reads it: a FeatureCollection of closed polygons in level-0 pixels, one object per line.

The keys are those of QuPath's own type adapters (since version 0.4): a UUID as ``id``, ``objectType``,
``classification`` with a name and a colour, ``isLocked``, and ``measurements`` as a dictionary of numbers. Objects go
the file one by one, so that memory does not grow with their number.

Dimension key: N objects.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from maskattn.files import replacing

__all__ = ["PALETTE", "FeatureFile", "ObjectClass", "feature_collection", "number"]

# The palette of Okabe and Ito, which people with any kind of colour vision can distinguish.
PALETTE = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (240, 228, 66),
    (0, 0, 0),
)

Ring = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class ObjectClass:
    """A class as QuPath shows it.

    Attributes:
        name: the name of the class.
        rgb: red, green and blue of its colour, 0 to 255.
    """

    name: str
    rgb: tuple[int, int, int]

    @property
    def text(self) -> str:
        """The class as JSON."""
        return json.dumps({"name": self.name, "color": self.rgb})


class FeatureFile:
    """An open FeatureCollection.

    Args:
        file: the file to write to.
        of: a text that identifies the map. Ids are derived from it and from an object's kind, class and geometry, so
            that the same map gives the same ids.
    """

    def __init__(self, file: TextIO, of: str) -> None:
        self._file = file
        self._space = uuid.uuid5(uuid.NAMESPACE_OID, of)
        self._names: dict[str, str] = {}
        self.count = 0

    def write_box(
        self,
        kind: str,
        box: tuple[str, str, str, str],
        of_class: str | None,
        measurements: Iterable[tuple[str, float]],
    ) -> None:
        """Write a rectangle.

        Args:
            kind: "tile" or "detection".
            box: left, top, right and bottom in level-0 pixels, formatted by :func:`number`.
            of_class: the JSON of an :class:`ObjectClass`; None for an unclassified object.
            measurements: names and values; values that are not finite are left out.
        """
        left, top, right, bottom = box
        ring = f"[[[{left},{top}],[{right},{top}],[{right},{bottom}],[{left},{bottom}],[{left},{top}]]]"
        self._write(kind, f'{{"type":"Polygon","coordinates":{ring}}}', of_class, measurements, "")

    def write_region(
        self, rings: Sequence[Ring], of_class: str, name: str, measurements: Iterable[tuple[str, float]]
    ) -> None:
        """Write a polygon as a locked annotation.

        Args:
            rings: closed rings of level-0 x and y; the first is the outline, the others are its holes.
            of_class: the JSON of an :class:`ObjectClass`.
            name: the annotation's name.
            measurements: names and values; values that are not finite are left out.
        """
        text = ",".join("[" + ",".join(f"[{number(x)},{number(y)}]" for x, y in ring) + "]" for ring in rings)
        more = f',"name":{json.dumps(name)},"isLocked":true'
        self._write("annotation", f'{{"type":"Polygon","coordinates":[{text}]}}', of_class, measurements, more)

    def _write(
        self, kind: str, geometry: str, of_class: str | None, measurements: Iterable[tuple[str, float]], more: str
    ) -> None:
        of_class = "" if of_class is None else f',"classification":{of_class}'
        values = ",".join(f"{self._quoted(name)}:{value:.7g}" for name, value in measurements if math.isfinite(value))
        identity = uuid.uuid5(self._space, f"{kind} {of_class} {geometry}")
        self._file.write(
            f'{"," if self.count else ""}\n{{"type":"Feature","id":"{identity}","geometry":{geometry},"properties":'
            f'{{"objectType":"{kind}"{more}{of_class},"measurements":{{{values}}}}}}}'
        )
        self.count += 1

    def _quoted(self, name: str) -> str:
        if name not in self._names:
            self._names[name] = json.dumps(name)
        return self._names[name]


@contextmanager
def feature_collection(path: Path, about: Mapping[str, Any], of: str) -> Iterator[FeatureFile]:
    """Open a FeatureCollection to write object by object; the file appears when the context ends without an error.

    Args:
        path: the file to write.
        about: metadata of the file, stored under the key "maskattn".
        of: a text that identifies the map, from which the objects' ids are derived.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="ascii", newline="\n") as file:
        file.write(f'{{"type":"FeatureCollection","maskattn":{json.dumps(about)},"features":[')
        yield FeatureFile(file, of)
        file.write("\n]}\n")


def number(value: float) -> str:
    """Format a coordinate: as an integer if it is one, else with four decimals.

    Example:
        >>> number(64.0), number(133.33333)
        ('64', '133.3333')
    """
    return str(int(value)) if value == int(value) else f"{value:.4f}"
