"""Read outlines of areas on a slide from GeoJSON: QuPath's annotations, TRIDENT's contours, this package's maps.

Polygons with their holes are read, also in MultiPolygons and GeometryCollections; points and lines have no area. An
outline that crosses itself is repaired so that it contains everything that it encloses; areas beyond the slide's edge
are cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.slide.names import as_text, shortened
from maskattn.slide.outlines.json_features import read_features
from maskattn.slide.outlines.names import nearest

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["Outlines", "read_outlines"]

# Outlines drawn along the edge of a slide overstep it slightly; more means another slide, or another unit.
_OVERSTEP = 0.05
_MOST_NESTED = 20
_FLAT = ("Point", "MultiPoint", "LineString", "MultiLineString")
_IN_PIXELS = "outlines are read in pixels of level 0, as QuPath exports them for this very slide"


@dataclass(frozen=True, eq=False)
class Outlines:
    """The area that a file outlines on a slide.

    Attributes:
        area: a shapely Polygon or MultiPolygon in level-0 pixels, within the slide.
        notes: sentences for the user about repairs and omissions.
    """

    area: Any
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class _Found:
    """The polygons of a file, and how many of its features were skipped or repaired."""

    polygons: list[Any] = field(default_factory=list)
    classes: dict[str, None] = field(default_factory=dict)
    features: int = 0
    without_area: int = 0
    ignored: int = 0
    beyond: int = 0


def read_outlines(path: str | os.PathLike[str], info: SlideInfo, classes: Sequence[str] | None = None) -> Outlines:
    """Read the area that a GeoJSON file outlines.

    Args:
        path: the file.
        info: the slide that the file belongs to.
        classes: names of the classifications to read; None reads all but QuPath's "Ignore*".

    Raises:
        SlideError: the file is missing or is not GeoJSON, it has no polygon of these classes, a polygon is not on the
            slide, or no feature has one of the classes.
    """
    import shapely

    path = Path(path)
    found = _Found()
    for feature in read_features(path):
        found.features += 1
        where = f"feature {found.features} of {shortened(path)}"
        if _counts(feature, classes, found, where):
            found.polygons += _polygons(feature.get("geometry"), info, found, where)
    _check_classes(path, found, classes)
    polygons, notes = _mended(found.polygons)
    notes += _notes(found)
    try:
        area = shapely.union_all(polygons)
        within = shapely.intersection(area, shapely.box(0, 0, info.width_px, info.height_px))
    except shapely.errors.GEOSException as error:
        raise SlideError(
            f"outlines must be polygons that can be united, got {as_text(path)}, which fails with '{error}'; "
            "draw anew what crosses itself"
        ) from error
    pieces = shapely.get_parts(within)
    pieces = pieces[(shapely.get_type_id(pieces) == 3) & (shapely.area(pieces) > 0)]
    if not len(pieces):
        of = f" of class {' or '.join(map(repr, classes))}" if classes else ""
        what = f"{found.features} features{of} without any" if found.features else "no feature"
        raise SlideError(
            f"a file of outlines must hold a polygon with an area, got {what} in {as_text(path)}; "
            "draw an area and export it"
        )
    return Outlines(shapely.union_all(pieces), tuple(notes))


def _counts(feature: Any, classes: Sequence[str] | None, found: _Found, where: str) -> bool:
    """Return whether a feature is of the requested classes, and record its class in ``found``."""
    if not isinstance(feature, dict):
        raise SlideError(
            f"a feature of GeoJSON must be an object, got {shortened(repr(feature))} as {where}; export the file anew"
        )
    name = _class_of(feature)
    if name is not None:
        found.classes[name] = None
    if classes is not None:
        return name in classes
    if name == "Ignore*":
        found.ignored += 1
        return False
    return True


def _class_of(feature: dict[str, Any]) -> str | None:
    """Return the name of a feature's class, as any version of QuPath writes it; None if it has no class."""
    properties = feature.get("properties")
    stated = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(stated, dict):
        names = stated.get("names")
        stated = ": ".join(map(str, names)) if isinstance(names, list) else stated.get("name")
    return stated if isinstance(stated, str) and stated else None


def _polygons(geometry: Any, info: SlideInfo, found: _Found, where: str, depth: int = 0) -> Iterator[Any]:
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if geometry is None or kind in _FLAT:
        found.without_area += 1
    elif kind == "GeometryCollection" and isinstance(geometry.get("geometries"), list) and depth < _MOST_NESTED:
        for one in geometry["geometries"]:
            yield from _polygons(one, info, found, where, depth + 1)
    elif kind == "MultiPolygon" and isinstance(geometry.get("coordinates"), list):
        for rings in geometry["coordinates"]:
            yield _polygon(rings, info, found, where)
    elif kind == "Polygon":
        yield _polygon(geometry.get("coordinates"), info, found, where)
    else:
        raise SlideError(
            f"a geometry must be one of GeoJSON's, with its coordinates, got {shortened(repr(kind))} in {where}; "
            "export the file anew"
        )


def _polygon(rings: Any, info: SlideInfo, found: _Found, where: str) -> Any:
    import shapely

    if not isinstance(rings, list) or not rings:
        raise SlideError(
            f"a polygon must be a list of rings, got {shortened(repr(rings))} in {where}; export the file anew"
        )
    shell, *holes = (_ring(ring, info, found, where) for ring in rings)
    return shapely.Polygon(shell, holes)


def _ring(ring: Any, info: SlideInfo, found: _Found, where: str) -> np.ndarray:
    """Return the closed ring as an array of corners, (N, 2), after checking that it is on the slide."""
    points = _positions(ring)
    if points is None:
        raise SlideError(
            f"a ring must be a list of positions, each of two numbers, got {shortened(repr(ring))} in {where}; "
            "export the file anew"
        )
    points = points[:, :2].astype(np.float64)
    slack = _OVERSTEP * max(info.width_px, info.height_px)
    for axis, name, length in ((0, "x", info.width_px), (1, "y", info.height_px)):
        low, high = points[:, axis].min(), points[:, axis].max()
        if not (low >= -slack and high <= length + slack and high >= 0 and low <= length):
            raise SlideError(
                f"outlines must lie on their slide, where {name} goes from 0 to {length} px, got {name} from {low:g} "
                f"to {high:g} in {where}; {_IN_PIXELS}"
            )
    if (points < -1).any() or (points > (info.width_px + 1, info.height_px + 1)).any():
        found.beyond += 1
    if (points[0] != points[-1]).any():
        points = np.concatenate([points, points[:1]])
    if len(points) < 4:
        raise SlideError(
            f"a ring must have three corners at least, got {len(points) - 1} in {where}; draw it anew, or delete it"
        )
    return points


def _positions(ring: Any) -> np.ndarray | None:
    """Return the positions of a ring, (N, 2 or more); None if it contains anything else."""
    try:
        points = np.asarray(ring)
    except ValueError:  # some positions have more numbers than others
        if not all(isinstance(position, list) and len(position) > 1 for position in ring):
            return None
        try:
            points = np.asarray([position[:2] for position in ring])
        except ValueError:
            return None
    return points if points.ndim == 2 and points.shape[1] > 1 and points.dtype.kind in "iuf" else None


def _check_classes(path: Path, found: _Found, classes: Sequence[str] | None) -> None:
    for name in classes or ():
        if name not in found.classes:
            there = nearest(name, list(found.classes)) if found.classes else "no feature of the file has a class"
            raise SlideError(f"a class of outlines must be one of {as_text(path)}, got {name!r}; {there}")


def _mended(polygons: list[Any]) -> tuple[np.ndarray, list[str]]:
    """Repair invalid polygons: where one crosses itself, every area that it encloses is inside."""
    import shapely

    mended = np.array(polygons, dtype=object)
    broken = np.flatnonzero(~shapely.is_valid(mended)) if len(mended) else np.empty(0, np.intp)
    if not len(broken):
        return mended, []
    reason = shapely.is_valid_reason(mended[broken[0]])
    mended[broken] = shapely.make_valid(mended[broken], method="structure", keep_collapsed=False)
    return mended, [
        f"{len(broken)} of {len(mended)} outlines cross or touch themselves and were mended; the first: {reason}"
    ]


def _notes(found: _Found) -> list[str]:
    notes = {
        "{} outlines reach beyond the slide's edge; what lies beyond was cut off": found.beyond,
        "{} features are points, lines or empty, and hold no area": found.without_area,
        "{} features of the class Ignore* were left out": found.ignored,
    }
    return [text.format(count) for text, count in notes.items() if count]
