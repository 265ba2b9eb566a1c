"""The score, defined once for every kernel: its formula, and the gradients of its terms.

    score_ij = scale · q_i·k_j − slope · ‖x_i − x_j‖ + bias_j

Scores are computed in units of log2, with log2(e) folded into the scale and the slopes, because the hardware computes
exp2. Scores with a key bias, and all scores of a readout, are *natural*: they are converted to units of log2 only after
the maximum is subtracted, so that a large bias is not rounded by a factor, does not overflow and loses no more digits
than float32 must.

A program calls ``begin_scores`` once for its sequence and head, ``query_terms`` and ``key_terms`` for each tile, and
``scores`` for each product. A launcher passes all terms as one argument, ``Terms``, so that a new term is added here
and in ``launch/arguments.py``, and no kernel changes.

Dimension key: M queries of a tile, N keys of a tile; R × C is M × N, or N × M in kernels that compute the transpose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from maskattn.kernels.language.bundles import Positions, Tokens
from maskattn.kernels.language.dropout import dropout_factors, load_noise
from maskattn.kernels.language.tiles import (
    INTERPRETING,
    LOG2_E,
    load_row_values,
    positions_base,
    tile_offsets,
    tokens_base,
)

__all__ = [
    "Terms",
    "along_product",
    "begin_scores",
    "distances",
    "gradient_of_terms",
    "in_units",
    "kept_factors",
    "key_terms",
    "load_positions",
    "query_terms",
    "scores",
]


class Terms(NamedTuple):
    """The options that turn q·k into scores and drop weights, as arguments of the kernels."""

    scale: Any
    key_bias: Any
    slopes: Any
    coords_q: Any
    coords_k: Any
    dropout: Any


class Scoring(NamedTuple):
    """The terms of one sequence and head: numbers, and pointers to the values of its first query and key."""

    scale: Any
    slope: Any
    bias: Any
    query_positions: Any
    key_positions: Any
    noise: Any


class QueryTerms(NamedTuple):
    """The terms of a tile's queries: positions (x, y), [M] each, or None."""

    positions: Any


class KeyTerms(NamedTuple):
    """The terms of a tile's keys: bias [N] and positions (x, y), [N] each, or None."""

    bias: Any
    positions: Any


class Scores(NamedTuple):
    """The scores of a tile; the factor still to be applied to them, or None; the distances, or None without ALiBi."""

    tile: Any
    factor: Any
    distances: Any


class GradientOfTerms(NamedTuple):
    """The gradients of a tile's scale · q·k, and of its slope with the sign changed, or None without ALiBi."""

    product: Any
    slope: Any


class Kept(NamedTuple):
    """The dropout factors of a tile's weights, or None without dropout."""

    factors: Any


@triton.jit
def in_units(x, NATURAL: tl.constexpr):
    """Convert a number in natural units to the units of the scores."""
    return x if NATURAL else x * LOG2_E


@triton.jit
def begin_scores(
    terms, head, sequence, q_start, k_start, INDEX_Q: tl.constexpr, INDEX_K: tl.constexpr, NATURAL: tl.constexpr
):
    """Load the terms of one sequence and head."""
    bias_ptr, slope, noise = None, 0.0, None
    query_positions, key_positions = terms.coords_q, terms.coords_k
    if terms.key_bias.ptr is not None:
        bias_ptr = tokens_base(terms.key_bias, sequence, head, k_start, INDEX_K)
    if terms.slopes is not None:
        slope = in_units(tl.load(terms.slopes + head).to(tl.float32), NATURAL)
        q_ptr = positions_base(terms.coords_q, sequence, q_start, INDEX_Q)
        query_positions = Positions(q_ptr, 0, terms.coords_q.stride_t, terms.coords_q.stride_c)
        k_ptr = positions_base(terms.coords_k, sequence, k_start, INDEX_K)
        key_positions = Positions(k_ptr, 0, terms.coords_k.stride_t, terms.coords_k.stride_c)
    if terms.dropout.seed_ptr is not None:
        noise = load_noise(terms.dropout, head, sequence)
    bias = Tokens(bias_ptr, 0, 0, terms.key_bias.stride_t, None)
    return Scoring(terms.scale, slope, bias, query_positions, key_positions, noise)


@triton.jit
def query_terms(scoring, first, rows, inside, INDEXED: tl.constexpr, PARTIAL: tl.constexpr):
    """Load the terms of a tile's queries."""
    positions = None
    if scoring.query_positions.ptr is not None:
        positions = load_positions(scoring.query_positions, first, rows, inside, INDEXED, PARTIAL)
    return QueryTerms(positions)


@triton.jit
def key_terms(scoring, first, rows, inside, INDEXED: tl.constexpr, PARTIAL: tl.constexpr):
    """Load the terms of a tile's keys."""
    bias, positions = None, None
    if scoring.bias.ptr is not None:
        bias = load_row_values(scoring.bias.ptr, first, rows, scoring.bias.stride_t, inside, 0.0, INDEXED, PARTIAL)
    if scoring.key_positions.ptr is not None:
        positions = load_positions(scoring.key_positions, first, rows, inside, INDEXED, PARTIAL)
    return KeyTerms(bias, positions)


@triton.jit
def scores(qk, scoring, queries, keys, TRANSPOSED: tl.constexpr, SCALE_LATER: tl.constexpr = False):
    """Compute the scores of a tile.

    Args:
        qk: the products, [M, N] or transposed.
        scoring, queries, keys: the results of ``begin_scores``, ``query_terms`` and ``key_terms``.
        TRANSPOSED: whether the keys are the rows.
        SCALE_LATER: whether to return unscaled products with the scale as their factor if there are no other terms.
    """
    factor, distance = None, None
    if SCALE_LATER and keys.bias is None and keys.positions is None:
        result = qk
        factor = scoring.scale
    else:
        result = qk * scoring.scale
    if keys.positions is not None:
        if TRANSPOSED:
            distance = distances(keys.positions, queries.positions)
        else:
            distance = distances(queries.positions, keys.positions)
        result -= distance * scoring.slope
    if keys.bias is not None:
        result += keys.bias[:, None] if TRANSPOSED else keys.bias[None, :]
    return Scores(result, factor, distance)


@triton.jit
def along_product(score, x):
    """Multiply x by the derivative of scores by their scaled products, which is 1, since the other terms are added.

    Args:
        score: the result of ``scores``.
        x: tensor of the tile's shape.
    """
    return x


@triton.jit
def gradient_of_terms(score, ds):
    """Return the gradients of the terms of a tile's scores.

    Args:
        score: the result of ``scores``.
        ds: the gradient of the scores, and so of the bias.
    """
    slope = None
    if score.distances is not None:
        slope = ds * score.distances
    return GradientOfTerms(along_product(score, ds), slope)


@triton.jit
def kept_factors(
    scoring, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Return the dropout factor of each weight of a tile, [M, N] or transposed."""
    factors = None
    if scoring.noise is not None:
        factors = dropout_factors(scoring.noise, first_query, first_key, BLOCK_M, BLOCK_N, TRANSPOSED)
    return Kept(factors)


@triton.jit
def load_positions(positions, first, rows, inside, INDEXED: tl.constexpr, PARTIAL: tl.constexpr):
    """Load the two coordinates of each row of a tile: [BLOCK], [BLOCK]."""
    shift, offsets = tile_offsets(first, rows, positions.stride_t, INDEXED)
    pointers = positions.ptr + shift + offsets
    if PARTIAL:
        x = tl.load(pointers, mask=inside, other=0.0)
        y = tl.load(pointers + positions.stride_c, mask=inside, other=0.0)
    else:
        x = tl.load(pointers)
        y = tl.load(pointers + positions.stride_c)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def distances(rows, columns):
    """Return the distances of the positions (x, y) of rows and columns, [R, C]; 0 for tokens without a position."""
    # [R, C]
    dx = rows[0][:, None] - columns[0][None, :]
    dy = rows[1][:, None] - columns[1][None, :]
    squared = dx * dx + dy * dy
    # On hardware the maximum of NaN and 0 is 0, at half the cost of a select; in the interpreter it is NaN.
    squared = tl.where(squared == squared, squared, 0.0) if INTERPRETING else tl.maximum(squared, 0.0)
    return tl.sqrt(squared)
