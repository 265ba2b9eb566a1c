"""GeoJSON as programs write it, for tests: polygons, features and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def ring(*corners: tuple[float, float]) -> list[list[float]]:
    return [list(corner) for corner in (*corners, corners[0])]


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return ring((left, top), (right, top), (right, bottom), (left, bottom))


def polygon(*rings: list[list[float]]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


def feature(geometry: Any, of_class: Any = None, **properties: Any) -> dict[str, Any]:
    """An annotation as QuPath writes it."""
    if of_class is not None:
        properties["classification"] = {"name": of_class, "color": [200, 0, 0]} if type(of_class) is str else of_class
    return {
        "type": "Feature",
        "id": "9d1d7a4e-5b0c-4a7c-8f51-6f3c3a1d9e10",
        "geometry": geometry,
        "properties": {"objectType": "annotation", **properties},
    }


def write(path: Path, *features: Any, bare: bool = False) -> Path:
    """A FeatureCollection, or a bare list as QuPath writes unless it is asked otherwise."""
    content = list(features) if bare else {"type": "FeatureCollection", "features": list(features)}
    path.write_text(json.dumps(content))
    return path
