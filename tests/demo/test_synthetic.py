"""Synthetic slides: reproducible, with the answer where it is said to be, and readable as slides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("openslide")

from maskattn.demo.synthetic import CLASSES, SyntheticSlide, make_slide, write_slide
from maskattn.slide.reader import SlideReader

SMALL = 1024


@pytest.fixture(scope="module")
def slides() -> list[SyntheticSlide]:
    return [make_slide(31 + label, label, SMALL) for label in range(len(CLASSES))]


def test_one_seed_draws_one_slide() -> None:
    first, again, other = (make_slide(seed, size_px=SMALL) for seed in (5, 5, 6))
    assert first.label == again.label
    assert np.array_equal(first.image_HW3, again.image_HW3)
    assert np.array_equal(first.lesion_HW, again.lesion_HW)
    assert not np.array_equal(first.image_HW3, other.image_HW3)


def test_a_benign_slide_has_no_lesion_and_the_others_have_one(slides: list[SyntheticSlide]) -> None:
    for label, slide in enumerate(slides):
        assert slide.label == label
        assert slide.lesion_HW.any() == (label > 0)


def test_lesions_lie_in_tissue_and_leave_some_of_it_benign(slides: list[SyntheticSlide]) -> None:
    for slide in slides:
        assert not (slide.lesion_HW & ~slide.tissue_HW).any()
        assert slide.lesion_HW.sum() < 0.9 * slide.tissue_HW.sum()


def test_tissue_covers_a_fifth_to_a_half(slides: list[SyntheticSlide]) -> None:
    for slide in slides:
        assert 0.15 < slide.tissue_HW.mean() < 0.5


def test_the_lesion_alone_depends_on_the_class() -> None:
    benign, low, high = (make_slide(8, label, SMALL) for label in range(3))
    assert np.array_equal(low.lesion_HW, high.lesion_HW)
    assert np.array_equal(benign.tissue_HW, low.tissue_HW)
    assert np.array_equal(benign.tissue_HW, high.tissue_HW)


@pytest.mark.parametrize("seed", range(4))
def test_marks_lie_on_glass_only(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = make_slide(seed, 0, SMALL)
    monkeypatch.setattr("maskattn.demo.synthetic.mark_glass", lambda rng, image, tissue: None)
    clean = make_slide(seed, 0, SMALL)
    changed = (marked.image_HW3 != clean.image_HW3).any(axis=2)
    assert changed.any()
    assert not (changed & marked.tissue_HW).any()


def test_a_written_slide_reads_back_with_its_spacing(tmp_path: Path, slides: list[SyntheticSlide]) -> None:
    path = write_slide(slides[1], tmp_path / "low.tiff")
    with SlideReader(path) as reader:
        info = reader.info
        assert info.spacing_um == pytest.approx(1.0)
        assert info.spacing_source == "metadata"
        assert info.level_dimensions == ((1024, 1024), (512, 512), (256, 256))
        pixels = reader.read_region(0, 0, (SMALL, SMALL), (SMALL, SMALL))
    assert np.array_equal(pixels, slides[1].image_HW3)


@pytest.mark.parametrize(("arguments", "message"), [({"label": 3}, "label=3"), ({"size_px": 100}, "size_px=100")])
def test_wrong_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_slide(0, **arguments)


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_slide_can_hold_a_lesion(seed: int) -> None:
    assert make_slide(seed, label=2, size_px=768).lesion_HW.any()
