from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskattn._native import token_coverage


def overlaps(origin: float, size: float, count: int, pixels: int) -> np.ndarray:
    """(count, pixels) lengths that tokens and mask pixels share on one axis, in mask pixels."""
    token = origin + np.arange(count + 1) * size
    pixel = np.arange(pixels + 1)
    end = np.minimum(token[1:, None], pixel[None, 1:])
    start = np.maximum(token[:-1, None], pixel[None, :-1])
    return np.maximum(end - start, 0.0)


def slow_coverage(
    mask: np.ndarray,
    px: tuple[float, float],
    origin: tuple[float, float],
    token: tuple[float, float],
    rows: int,
    cols: int,
) -> np.ndarray:
    """The specification: for each token and mask pixel, the area that they share. Tuples of two are (x, y)."""
    over_y = overlaps(origin[1] / px[1], token[1] / px[1], rows, mask.shape[0])
    over_x = overlaps(origin[0] / px[0], token[0] / px[0], cols, mask.shape[1])
    area = np.einsum("ry,yx,cx->rc", over_y, (mask != 0).astype(np.float64), over_x)
    return area / (token[0] / px[0] * token[1] / px[1])


def random_mask(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, cols)) < 0.5


@settings(deadline=None, max_examples=200)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    px=st.tuples(st.floats(0.3, 50), st.floats(0.3, 50)),
    origin=st.tuples(st.floats(-200, 200), st.floats(-200, 200)),
    token=st.tuples(st.floats(0.5, 300), st.floats(0.5, 300)),
    lattice=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    threads=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_coverage_is_the_shared_area(
    shape: tuple[int, int],
    px: tuple[float, float],
    origin: tuple[float, float],
    token: tuple[float, float],
    lattice: tuple[int, int],
    threads: int,
    seed: int,
) -> None:
    mask = random_mask(*shape, seed=seed)
    fraction = token_coverage(mask, *px, *origin, *token, *lattice, threads)
    assert fraction.dtype == np.float32
    assert fraction.shape == lattice
    np.testing.assert_allclose(fraction, slow_coverage(mask, px, origin, token, *lattice), atol=1e-6)


def test_tokens_smaller_than_a_mask_pixel_are_exact() -> None:
    mask = np.array([[1, 0], [0, 1]], np.uint8)
    fraction = token_coverage(mask, 10, 10, 0, 0, 3, 3, 7, 7)
    np.testing.assert_allclose(fraction, slow_coverage(mask, (10, 10), (0, 0), (3, 3), 7, 7), atol=1e-7)
    assert fraction[0, 0] == 1.0
    assert fraction[3, 0] == pytest.approx(1 / 3)  # spans 9 to 12, of which 9 to 10 is tissue


def test_tokens_over_the_edge_count_the_outside_as_glass() -> None:
    mask = np.ones((4, 4), bool)
    fraction = token_coverage(mask, 1, 1, -1, -1, 2, 2, 4, 4)
    inside = np.array([0.5, 1, 0.5, 0], np.float32)
    np.testing.assert_array_equal(fraction, np.outer(inside, inside))


def test_mask_pixels_need_not_be_square() -> None:
    mask = random_mask(30, 20)
    fraction = token_coverage(mask, 12.5, 7.25, 0, 0, 32.125, 32.125, 7, 8)
    np.testing.assert_allclose(fraction, slow_coverage(mask, (12.5, 7.25), (0, 0), (32.125, 32.125), 7, 8), atol=1e-6)


@pytest.mark.parametrize("token_lv0", [32.125, 7.1, 0.3, 1 / 3, 257 / 8])
def test_fractions_are_exactly_one_within_tissue_and_exactly_zero_without(token_lv0: float) -> None:
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    count = int(64 * 16 / token_lv0)
    fraction = token_coverage(mask, 16.032, 16.032, 0, 0, token_lv0, token_lv0, 3, count)
    edge = 32 * 16.032 / token_lv0
    assert (fraction[:, : int(edge)] == 0).all()
    assert (fraction[:, int(np.ceil(edge)) :] == 1).all()


def test_rounding_spills_no_tissue_over_a_pixel_edge() -> None:
    # 3 * 0.1 exceeds 0.3 by rounding: the token that ends there must not touch the tissue that begins there.
    mask = np.array([[0, 0, 0, 1]], bool)
    assert token_coverage(mask, 0.1, 0.1, 0, 0, 0.3, 0.1, 1, 1)[0, 0] == 0.0


@pytest.mark.parametrize("value", [1, 2, 255])
def test_any_byte_but_zero_is_tissue(value: int) -> None:
    mask = np.zeros((300, 300), np.uint8)
    mask[10:290, 20:] = value
    np.testing.assert_array_equal(
        token_coverage(mask, 1, 1, 0, 0, 7, 7, 43, 43), token_coverage(mask > 0, 1, 1, 0, 0, 7, 7, 43, 43)
    )


def test_the_number_of_threads_changes_nothing() -> None:
    mask = random_mask(1500, 1100)
    one = token_coverage(mask, 1.3, 1.7, -5.5, 3.25, 9.7, 11.3, 223, 151, 1)
    for threads in (0, 2, 3, 7, 222, 10_000):
        np.testing.assert_array_equal(token_coverage(mask, 1.3, 1.7, -5.5, 3.25, 9.7, 11.3, 223, 151, threads), one)


def test_calls_from_several_threads_agree() -> None:
    mask = random_mask(700, 700)
    expected = token_coverage(mask, 1, 1, 0, 0, 5, 5, 140, 140)
    results: list[np.ndarray] = []
    calls = [
        threading.Thread(target=lambda: results.append(token_coverage(mask, 1, 1, 0, 0, 5, 5, 140, 140)))
        for _ in range(8)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(results) == 8
    assert all((result == expected).all() for result in results)


def test_python_runs_on_meanwhile() -> None:
    mask = np.ones((4000, 4000), bool)
    times: dict[str, float] = {}

    def cover() -> None:
        times["start"] = time.perf_counter()
        token_coverage(mask, 1, 1, 0, 0, 4000, 0.02, 200_000, 1, 1)
        times["end"] = time.perf_counter()

    thread = threading.Thread(target=cover)
    ticks = []
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks.append(time.perf_counter())
    within = [tick for tick in ticks if times["start"] < tick < times["end"]]
    assert len(within) >= 5, f"{len(within)} ticks in {times['end'] - times['start']:.3f} s: the GIL was held"


def test_a_large_mask_in_one_call() -> None:
    mask = np.zeros((10_000, 10_000), np.uint8)
    mask[2500:7500, 2500:7500] = 1
    fraction = token_coverage(mask, 4, 4, 0, 0, 32, 32, 1250, 1250)
    assert fraction.mean(dtype=np.float64) == pytest.approx(0.25)
    assert fraction[0, 0] == 0.0
    assert fraction[625, 625] == 1.0
    assert fraction[312, 625] == 0.5  # from row 2496 to 2504: half of it is tissue


def call(**changes: Any) -> np.ndarray:
    arguments: dict[str, Any] = {
        "mask": np.ones((4, 4), bool),
        "px_lv0_x": 1.0,
        "px_lv0_y": 1.0,
        "origin_x_lv0": 0.0,
        "origin_y_lv0": 0.0,
        "token_w_lv0": 2.0,
        "token_h_lv0": 2.0,
        "rows": 2,
        "cols": 2,
        "threads": 1,
    }
    return token_coverage(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": [[True]]}, TypeError, "numpy array, got <class 'list'>; call numpy.asarray"),
        ({"mask": None}, TypeError, "got <class 'NoneType'>"),
        ({"mask": np.ones((4, 4))}, TypeError, "got mask.dtype=float64; pass e.g. mask > 0"),
        ({"mask": np.ones((4, 4), np.int8)}, TypeError, "got mask.dtype=int8"),
        ({"mask": np.ones((4, 4), object)}, TypeError, "got mask.dtype=object"),
        ({"mask": np.ones(4, bool)}, ValueError, r"got mask.shape=\(4,\)"),
        ({"mask": np.ones((4, 4, 3), bool)}, ValueError, r"got mask.shape=\(4, 4, 3\); pass one plane"),
        ({"mask": np.ones((0, 4), bool)}, ValueError, r"got mask.shape=\(0, 4\)"),
        ({"mask": np.ones((4, 8), bool)[:, ::2]}, ValueError, "strided view; call numpy.ascontiguousarray"),
        ({"mask": np.asfortranarray(np.eye(4, dtype=bool))}, ValueError, "C-contiguous"),
        ({"px_lv0_x": 0.0}, ValueError, "got px_lv0_x=0"),
        ({"px_lv0_y": -1.0}, ValueError, "got px_lv0_y=-1"),
        ({"px_lv0_y": float("nan")}, ValueError, "got px_lv0_y=-?nan"),
        ({"token_w_lv0": float("inf")}, ValueError, "got token_w_lv0=inf"),
        ({"token_h_lv0": 0.0}, ValueError, "got token_h_lv0=0"),
        ({"token_h_lv0": 1e-4}, ValueError, "a thousandth of a mask pixel, got token size=0.0001"),
        ({"px_lv0_x": 1e-320}, ValueError, "finite positions"),
        ({"origin_x_lv0": float("nan")}, ValueError, "finite positions, got origin_lv0_x=-?nan"),
        ({"origin_y_lv0": float("-inf")}, ValueError, "finite positions, got origin_lv0_y=-inf"),
        ({"token_w_lv0": 1e308, "cols": 100}, ValueError, "finite positions"),
        ({"rows": 0}, ValueError, "got rows=0"),
        ({"cols": -3}, ValueError, "got rows=2, got cols=-3"),
        ({"rows": 2**31, "cols": 1}, ValueError, "at most 2147483647 tokens in all, got rows=2147483648"),
        ({"rows": 2**40, "cols": 2**40}, ValueError, "in bands of rows"),
        ({"rows": 2**80}, TypeError, "incompatible function arguments"),
        ({"rows": 1.5}, TypeError, "incompatible function arguments"),
        ({"rows": None}, TypeError, "incompatible function arguments"),
        ({"threads": -1}, ValueError, "got threads=-1; 0 asks for one thread per core"),
    ],
)
def test_wrong_arguments_are_refused_with_the_rule_the_value_and_the_remedy(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


numbers = st.floats() | st.sampled_from([0.0, -0.0, 1e-320, 1e308, -1e308, 1e-3, 2.0**53])
counts = st.integers(-5, 64) | st.sampled_from([2**31, 2**62, -(2**63), 2**70])
masks = st.sampled_from(
    [
        np.ones((5, 3), bool),
        np.ones((1, 1), np.uint8),
        np.zeros((0, 0), bool),
        np.ones((3, 4), np.float32),
        np.ones((2, 2, 2), bool),
        np.ones((9, 9), bool)[::2],
        "mask",
        None,
    ]
)


@settings(deadline=None, max_examples=400)
@given(
    mask=masks,
    px=st.tuples(numbers, numbers),
    origin=st.tuples(numbers, numbers),
    token=st.tuples(numbers, numbers),
    rows=counts,
    cols=counts,
    threads=st.integers(-2, 9),
)
def test_any_arguments_give_fractions_or_an_exception(
    mask: Any,
    px: tuple[float, float],
    origin: tuple[float, float],
    token: tuple[float, float],
    rows: int,
    cols: int,
    threads: int,
) -> None:
    try:
        fraction = token_coverage(mask, *px, *origin, *token, rows, cols, threads)
    except (TypeError, ValueError):
        return
    assert fraction.shape == (rows, cols)
    assert ((fraction >= 0) & (fraction <= 1)).all()
