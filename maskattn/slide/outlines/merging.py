"""Regions: squares of a map that meet become polygons, with holes where none lie.

Dimension key: N squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from maskattn.shapes import Float

__all__ = ["merged", "rings_of"]


def merged(boxes_N4: Float[np.ndarray, "N 4"]) -> list[Any]:
    """The regions that some rectangles make, as shapely's polygons, from top to bottom.

    Args:
        boxes_N4: (N, 4) left, top, right and bottom; neighbours share their edges' very numbers.
    """
    import shapely

    if not len(boxes_N4):
        return []
    # Rows of squares are joined first: a few long boxes are united sooner than many squares.
    boxes = boxes_N4[np.lexsort((boxes_N4[:, 0], boxes_N4[:, 3], boxes_N4[:, 1]))]
    goes_on = (boxes[1:, 0] == boxes[:-1, 2]) & (boxes[1:, [1, 3]] == boxes[:-1, [1, 3]]).all(axis=1)
    first = np.flatnonzero(np.concatenate([[True], ~goes_on]))
    last = np.concatenate([first[1:], [len(boxes)]]) - 1
    rows = shapely.box(boxes[first, 0], boxes[first, 1], boxes[last, 2], boxes[first, 3])
    polygons = shapely.get_parts(shapely.simplify(shapely.union_all(rows), 0))
    bounds = shapely.bounds(polygons)
    return list(polygons[np.lexsort((bounds[:, 0], bounds[:, 1]))])


def rings_of(polygon: Any) -> list[list[tuple[float, float]]]:
    """The closed rings of a shapely polygon: its outline, then its holes."""
    return [list(ring.coords) for ring in (polygon.exterior, *polygon.interiors)]
