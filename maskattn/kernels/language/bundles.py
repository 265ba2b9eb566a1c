"""What travels together: bundles of arguments of the kernels, and of what a program has of one sequence and head.

The terms of the score are in ``scores.py``.

A pointer of None is absent, which is known when a kernel is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = [
    "ABSENT",
    "NO_POSITIONS",
    "Bounds",
    "Dropout",
    "Keys",
    "Noise",
    "Positions",
    "Queries",
    "RowValues",
    "Tokens",
    "Width",
]


class Tokens(NamedTuple):
    """A tensor by sequence, head and token; what lies along the head width is contiguous.

    ``multiple`` is a number that all strides are multiples of, known when a kernel is compiled, or None where the
    launcher finds it out by itself or there is none.
    """

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    multiple: Any = None


class RowValues(NamedTuple):
    """A contiguous tensor with one number for each sequence, head and query."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class Positions(NamedTuple):
    """Two coordinates of each token."""

    ptr: Any
    stride_b: Any
    stride_t: Any
    stride_c: Any


class Bounds(NamedTuple):
    """Where the rows of each sequence lie, as :class:`~maskattn.kernels.launch.rows.Rows` has it."""

    starts_ptr: Any
    ends_ptr: Any
    index_ptr: Any


class Dropout(NamedTuple):
    """The seed, the words below which a weight is dropped (the bits of an unsigned number), and 1/(1 − dropout_p)."""

    seed_ptr: Any
    threshold: Any
    factor: Any


class Noise(NamedTuple):
    """What the random words of one program have in common."""

    low: Any
    high: Any
    threshold: Any
    factor: Any
    head: Any
    sequence: Any


class Width(NamedTuple):
    """Columns of a tile: HEAD count; they lie in a chunk of FIRST and, unless SECOND is 0, one of SECOND columns.

    PRECISION is how products along or of them are computed where they are float32, in ``tl.dot``'s words.
    """

    HEAD: Any
    FIRST: Any
    SECOND: Any
    PRECISION: Any


class Keys(NamedTuple):
    """The keys of one sequence and head, as a pass over them reads them."""

    k: Any
    v: Any
    index_ptr: Any
    start: Any
    stride_kt: Any
    stride_vt: Any


class Queries(NamedTuple):
    """The queries of one sequence and head, as a pass over them reads them."""

    q: Any
    dout: Any
    lse_ptr: Any
    lse_rest_ptr: Any
    delta_ptr: Any
    index_ptr: Any
    start: Any
    stride_qt: Any
    stride_gt: Any


ABSENT = Tokens(None, 0, 0, 0)
NO_POSITIONS = Positions(None, 0, 0, 0)
