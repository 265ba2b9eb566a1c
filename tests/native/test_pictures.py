"""The compressed rows of PNG files and maps laid over pictures, against zlib and numpy."""

from __future__ import annotations

import sys
import threading
import zlib

import numpy as np
import pytest

from maskattn._native import compressed_rows, lay_over
from maskattn.slide.overlay import blend


def read_back(stream: bytes, shape: tuple[int, int]) -> np.ndarray:
    """Undo the filter: the sums of all rows above, modulo 256."""
    rows = np.frombuffer(zlib.decompress(stream), np.uint8).reshape(shape[0], 1 + 3 * shape[1])
    assert (rows[:, 0] == 2).all()
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(*shape, 3)


@pytest.mark.parametrize("values", [1, 2, 5, 256])
@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (90, 1), (2, 3), (301, 403)])
def test_rows_read_back_bit_for_bit(shape: tuple[int, int], values: int) -> None:
    image = np.random.default_rng(0).integers(0, values, (*shape, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_back(compressed_rows(image), shape), image)


def test_repetitions_of_every_length_and_distance_read_back() -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (1, 3), dtype=np.uint8)]
    for length in [*range(1, 90), 2000, *rng.integers(1, 90, 600)]:
        written = np.concatenate(pixels)
        start = int(rng.integers(max(0, len(written) - 12_000), len(written)))
        pixels.append(np.resize(written[start:], (length, 3)) if rng.random() < 0.8 else rng.integers(0, 256, (7, 3)))
    row = np.concatenate(pixels).astype(np.uint8)[None]
    stream = compressed_rows(row)
    np.testing.assert_array_equal(read_back(stream, row.shape[:2]), row)
    assert len(stream) < 0.5 * row.nbytes


def test_symbols_whose_codes_would_be_too_long_read_back() -> None:
    rng = np.random.default_rng(0)
    differences = rng.geometric(0.5, (700, 900, 3)).astype(np.uint8)  # each is half as frequent as the one before
    image = np.cumsum(differences, axis=0, dtype=np.uint8)
    np.testing.assert_array_equal(read_back(compressed_rows(image), image.shape[:2]), image)


def test_noise_grows_by_little() -> None:
    image = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    assert len(compressed_rows(image)) < 1.003 * image.nbytes


def test_threads_compress_at_once() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    expected, got = compressed_rows(image), []
    threads = [threading.Thread(target=lambda: got.append(compressed_rows(image))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 4


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


def test_arguments_of_the_wrong_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compressed_rows needs pixels of \(Y, X, 3\).*image.shape=\(4, 5, 4\)"):
        compressed_rows(np.zeros((4, 5, 4), np.uint8))
    with pytest.raises(ValueError, match="neither Y nor X 0"):
        compressed_rows(np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(TypeError, match="uint8"):
        compressed_rows(np.zeros((4, 5, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compressed_rows needs"):
        compressed_rows(np.zeros((4, 10, 3), np.uint8)[:, ::2])


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
