"""PNG files: read back bit for bit by Pillow and OpenCV, with and without ISA-L."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from maskattn.png_files import write_png


@pytest.mark.parametrize("with_isal", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (67, 131)])
def test_an_image_reads_back_bit_for_bit(
    tmp_path: Path, shape: tuple[int, int], with_isal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    write_png(tmp_path / "image.png", image)
    with Image.open(tmp_path / "image.png") as read:
        read.verify()
    with Image.open(tmp_path / "image.png") as read:
        np.testing.assert_array_equal(np.asarray(read), image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "image.png"))[..., ::-1], image)


def test_a_view_of_an_image_is_written_as_it_looks(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)[::2, 10:50, ::-1]
    write_png(tmp_path / "image.png", image)
    with Image.open(tmp_path / "image.png") as read:
        np.testing.assert_array_equal(np.asarray(read), image)


def test_it_is_no_larger_than_what_pillow_writes_at_its_first_level(tmp_path: Path) -> None:
    photograph = np.random.default_rng(0).normal(0, 4, (300, 400, 3)) + np.linspace(60, 220, 400)[:, None]
    image = photograph.clip(0, 255).astype(np.uint8)
    image[100:200, 100:300] = (40, 90, 160)
    write_png(tmp_path / "ours.png", image)
    Image.fromarray(image).save(tmp_path / "theirs.png", compress_level=1)
    assert (tmp_path / "ours.png").stat().st_size <= (tmp_path / "theirs.png").stat().st_size


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        write_png(tmp_path / "absent" / "image.png", np.zeros((4, 4, 3), np.uint8))
    assert not list(tmp_path.iterdir())
