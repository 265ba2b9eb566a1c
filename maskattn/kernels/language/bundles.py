"""Named tuples of the kernels' arguments, and of a program's values for one sequence and head.

The terms of the score are in ``scores.py``. A pointer is None if the tensor is absent, which is known at compile time.
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
    """A tensor indexed by sequence, head and token, contiguous along the head width.

    ``multiple`` divides all strides and is known at compile time; it is None if Triton's launcher detects a multiple by
    itself, or there is none.
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
    """The two coordinates of each token."""

    ptr: Any
    stride_b: Any
    stride_t: Any
    stride_c: Any


class Bounds(NamedTuple):
    """The positions of each sequence's rows, as in :class:`~maskattn.kernels.launch.rows.Rows`."""

    starts_ptr: Any
    ends_ptr: Any
    index_ptr: Any


class Dropout(NamedTuple):
    """The seed, the threshold below which a random word drops its weight (unsigned bits), and 1/(1 − dropout_p).

    The offsets (B,) of queries and keys are those of ``Options``; None stands for 0.
    """

    seed_ptr: Any
    threshold: Any
    factor: Any
    query_offsets_ptr: Any = None
    key_offsets_ptr: Any = None


class Noise(NamedTuple):
    """The values that all random words of a program share."""

    low: Any
    high: Any
    threshold: Any
    factor: Any
    head: Any
    sequence: Any
    query_offset: Any
    key_offset: Any


class Width(NamedTuple):
    """The columns of a tile: HEAD in all, in a chunk of FIRST columns and, unless SECOND is 0, one of SECOND columns.

    PRECISION is the ``input_precision`` of ``tl.dot`` for float32 tiles.
    """

    HEAD: Any
    FIRST: Any
    SECOND: Any
    PRECISION: Any


class Keys(NamedTuple):
    """The keys of one sequence and head, as a loop over them reads them."""

    k: Any
    v: Any
    index_ptr: Any
    start: Any
    stride_kt: Any
    stride_vt: Any


class Queries(NamedTuple):
    """The queries of one sequence and head, as a loop over them reads them."""

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
