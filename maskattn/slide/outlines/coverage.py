"""How much of each square of a lattice an area covers, exactly: by Green's theorem over the edges of its outline.

An edge that goes down by dy within a square covers dy of every square at its right in that row, and of its own the part
that lies right of the edge. Edges are split where they cross the lattice's lines; what they add up to is exact but for
the rounding of float64. Work and memory follow the number of edges and squares, not pixels.

Dimension key: E edges, each (x, y) to (x, y); (R, C) squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from maskattn.shapes import Float

__all__ = ["edges_of", "share_covered"]


def edges_of(area: Any) -> Float[np.ndarray, "E 4"]:
    """The edges of a valid polygon or several, of holes too: x and y where each begins and where it ends.

    Outlines go round one way and holes the other, so that edges say on which side the area lies.
    """
    import shapely

    # In an image y grows downwards: what is clockwise to shapely has its area at the right of edges that go down.
    rings = shapely.get_rings(shapely.orient_polygons(shapely.get_parts(area), exterior_cw=False))
    points, ring = shapely.get_coordinates(rings, return_index=True)
    within = ring[1:] == ring[:-1]
    return np.concatenate([points[:-1][within], points[1:][within]], axis=1)


def share_covered(
    edges_E4: Float[np.ndarray, "E 4"], x: float, y: float, side: tuple[float, float], shape: tuple[int, int]
) -> Float[np.ndarray, "R C"]:
    """The share of each square that the area covers.

    Args:
        edges_E4: of :func:`edges_of`.
        x: left edge of the lattice.
        y: its upper edge.
        side: width and height of a square.
        shape: (R, C), rows and columns.
    """
    rows, columns = shape
    edges = (edges_E4 - (x, y, x, y)) / (*side, *side)
    low, high = np.minimum(edges[:, 1], edges[:, 3]), np.maximum(edges[:, 1], edges[:, 3])
    edges = edges[(low < rows) & (high > 0) & (low < high)]
    edges = _split(edges, 1)
    middle_y = (edges[:, 1] + edges[:, 3]) / 2
    edges = edges[(middle_y > 0) & (middle_y < rows)]
    # What lies left of the lattice covers all of a row, and what lies right of it nothing.
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
    """The edges cut at the whole numbers that they cross along an axis, 0 for x and 1 for y."""
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
        # An end is the edge's own: of a share by division it would be off by a rounding, or by more on a tiny edge.
        share = np.divide(at - of[:, axis], length, out=np.zeros(len(of)), where=~is_end)
        cut[:, column] = np.where(is_end, of[:, column], of[:, other] + across * share)
    return np.where(downwards, cut[:, [2, 3, 0, 1]], cut)
