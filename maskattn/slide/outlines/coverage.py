"""Compute the share of each square of a lattice that an area covers, by Green's theorem over the outline's edges.

An edge that descends by dy within a square contributes dy to every square to its right in that row, and to its own
square in proportion to the area right of the edge. Edges are split where they cross the lattice's lines; their sum is
exact up to float64 rounding. Time and memory grow with the numbers of edges and squares, not with pixels.

Dimension key: E edges, each (x, y) to (x, y); (R, C) squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from maskattn.shapes import Float

__all__ = ["edges_of", "share_covered"]


def edges_of(area: Any) -> Float[np.ndarray, "E 4"]:
    """Return the edges of a valid polygon or multipolygon, holes included: x and y of the start, then of the end.

    Outlines and holes have opposite orientations, so that the direction of an edge shows where the area is.
    """
    import shapely

    # In an image y grows downwards, so in shapely's clockwise rings the area is to the right of descending edges.
    rings = shapely.get_rings(shapely.orient_polygons(shapely.get_parts(area), exterior_cw=False))
    points, ring = shapely.get_coordinates(rings, return_index=True)
    within = ring[1:] == ring[:-1]
    return np.concatenate([points[:-1][within], points[1:][within]], axis=1)


def share_covered(
    edges_E4: Float[np.ndarray, "E 4"], x: float, y: float, side: tuple[float, float], shape: tuple[int, int]
) -> Float[np.ndarray, "R C"]:
    """Return the share of each square that the area covers, 0 to 1.

    Args:
        edges_E4: (E, 4) the edges from :func:`edges_of`.
        x: left edge of the lattice, in the unit of the edges.
        y: upper edge of the lattice.
        side: width and height of a square.
        shape: (R, C), rows and columns of squares.
    """
    rows, columns = shape
    edges = (edges_E4 - (x, y, x, y)) / (*side, *side)
    low, high = np.minimum(edges[:, 1], edges[:, 3]), np.maximum(edges[:, 1], edges[:, 3])
    edges = edges[(low < rows) & (high > 0) & (low < high)]
    edges = _split(edges, 1)
    middle_y = (edges[:, 1] + edges[:, 3]) / 2
    edges = edges[(middle_y > 0) & (middle_y < rows)]
    # An edge left of the lattice covers the complete row, and one right of it covers nothing.
    edges = _split(edges, 0)
    x_middle = ((edges[:, 0] + edges[:, 2]) / 2).clip(0, columns)
    row = np.floor((edges[:, 1] + edges[:, 3]) / 2).astype(np.intp).clip(0, rows - 1)
    column = np.floor(x_middle).astype(np.intp)
    falls = edges[:, 1] - edges[:, 3]
    steps = np.bincount(row * (columns + 2) + column, falls * (1 - (x_middle - column)), rows * (columns + 2))
    steps += np.bincount(row * (columns + 2) + column + 1, falls * (x_middle - column), rows * (columns + 2))
    share: np.ndarray = np.cumsum(steps.reshape(rows, columns + 2), axis=1)[:, :columns].clip(0, 1)
    return share


def _split(edges_E4: np.ndarray, axis: int) -> np.ndarray:
    """Cut the edges at the integers that they cross along an axis, 0 for x and 1 for y."""
    start, end = edges_E4[:, axis], edges_E4[:, axis + 2]
    low, high = np.minimum(start, end), np.maximum(start, end)
    first = np.floor(low) + 1
    cuts = np.maximum(np.ceil(high) - first, 0).astype(np.intp)
    pieces = cuts + 1
    edge = np.repeat(np.arange(len(edges_E4)), pieces)
    piece = np.arange(len(edge)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    of = edges_E4[edge]
    downwards = (of[:, axis] > of[:, axis + 2])[:, None]
    of = np.where(downwards, of[:, [2, 3, 0, 1]], of)
    other = 1 - axis
    length, across = of[:, axis + 2] - of[:, axis], of[:, other + 2] - of[:, other]
    is_first, is_last = piece == 0, piece == cuts[edge]
    begins = np.where(is_first, of[:, axis], first[edge] + piece - 1)
    ends = np.where(is_last, of[:, axis + 2], first[edge] + piece)
    cut = np.empty_like(of)
    cut[:, axis], cut[:, axis + 2] = begins, ends
    for column, at, is_end in ((other, begins, is_first), (other + 2, ends, is_last)):
        # The ends of an edge are copied: interpolation would add a rounding error, a large one on a tiny edge.
        share = np.divide(at - of[:, axis], length, out=np.zeros(len(of)), where=~is_end)
        cut[:, column] = np.where(is_end, of[:, column], of[:, other] + across * share)
    return np.where(downwards, cut[:, [2, 3, 0, 1]], cut)
