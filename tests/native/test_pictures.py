"""Maps laid over pictures, with the extension and without it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from maskattn._native import lay_over
from maskattn.slide.overlay import blend


@pytest.mark.parametrize("kind", ["diverging", "sequential"])
def test_a_blended_map_has_the_same_bits_without_the_extension(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    thumbnail = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    values = rng.normal(size=(70, 90)).astype(np.float32)
    values[rng.random((70, 90)) < 0.3] = np.nan
    for some in (values, np.full_like(values, np.nan)):
        expected = blend(thumbnail, some, kind)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "maskattn._native", None)
            np.testing.assert_array_equal(blend(thumbnail, some, kind), expected)


def operands(**replaced: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "picture": np.zeros((4, 5, 3), np.uint8),
        "grey": np.zeros((4, 5), np.uint8),
        "token": np.zeros((4, 5), np.int32),
        "colour": np.zeros(2, np.int32),
        "mixtures": np.zeros((1, 256, 3), np.uint8),
        "result": np.zeros((4, 5, 3), np.uint8),
        **replaced,
    }


@pytest.mark.parametrize(
    "replaced",
    [
        {"grey": np.zeros((4, 6), np.uint8)},
        {"picture": np.zeros((4, 5, 4), np.uint8)},
        {"mixtures": np.zeros((1, 255, 3), np.uint8)},
        {"result": np.zeros((4, 10, 3), np.uint8)[:, ::2]},
        {"result": np.zeros((5, 5, 3), np.uint8)},
        {"token": np.full((4, 5), 2, np.int32)},
        {"token": np.full((4, 5), -1, np.int32)},
        {"colour": np.ones(2, np.int32)},
    ],
)
def test_operands_that_do_not_fit_are_refused(replaced: dict[str, np.ndarray]) -> None:
    lay_over(**operands())
    with pytest.raises(ValueError, match=r"lay_over needs .* got "):
        lay_over(**operands(**replaced))
