"""Merge adjacent squares of a map into polygons, with holes where squares are missing.

Dimension key: N squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from maskattn.shapes import Float

__all__ = ["merged", "rings_of"]


def merged(boxes_N4: Float[np.ndarray, "N 4"]) -> list[Any]:
    """Merge rectangles into shapely polygons, ordered from top to bottom.

    Args:
        boxes_N4: (N, 4) left, top, right and bottom; the shared edges of neighbours must be exactly equal.
    """
    import shapely

    if not len(boxes_N4):
        return []
    # Squares are joined along rows first, because the union of few long boxes is faster than that of many squares.
    boxes = boxes_N4[np.lexsort((boxes_N4[:, 0], boxes_N4[:, 3], boxes_N4[:, 1]))]
    goes_on = (boxes[1:, 0] == boxes[:-1, 2]) & (boxes[1:, [1, 3]] == boxes[:-1, [1, 3]]).all(axis=1)
    first = np.flatnonzero(np.concatenate([[True], ~goes_on]))
    last = np.concatenate([first[1:], [len(boxes)]]) - 1
    rows = shapely.box(boxes[first, 0], boxes[first, 1], boxes[last, 2], boxes[first, 3])
    polygons = shapely.get_parts(shapely.simplify(shapely.union_all(rows), 0))
    bounds = shapely.bounds(polygons)
    return list(polygons[np.lexsort((bounds[:, 0], bounds[:, 1]))])


def rings_of(polygon: Any) -> list[list[tuple[float, float]]]:
    """Return the closed rings of a shapely polygon: its outline, then its holes."""
    return [list(ring.coords) for ring in (polygon.exterior, *polygon.interiors)]
