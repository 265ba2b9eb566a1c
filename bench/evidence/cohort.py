"""A synthetic cohort of prostate biopsies: six ordered grades, two patterns in known shares, two centres.

A biopsy is one strip of tissue on glass. Its lesion, of any size, consists of pattern A (small crowded glands) and
pattern B (sheets of nuclei without lumens). The grade depends only on the share of B in the lesion: 0 without a lesion,
1 for none, 5 for all, and 2 to 4 for the thirds between. A patient has one grade and several slides. The centres differ
in their scanner (stain, lamp, blur) and in their pens. A pen mark depends on a grade: there is none for 0, otherwise a
stroke that is longer for higher grades, with another ink above 2. If marks are informative, this is the slide's grade
in nine of ten slides; otherwise, and in the tenth slide, it is a random grade. Dust and coverslip edges are independent
of the grade. 1 px is about 5 µm: a toy slide, of the size that a toy model takes.

Dimension key: S slides, X·Y pixels, H·W tokens, M kinds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from maskattn.demo.textures import (
    ByteArray,
    Canvas,
    fibres,
    fill,
    hexagonal_points,
    paint_nuclei,
    smooth_noise,
    stain,
)

__all__ = [
    "GRADES",
    "GRID_HW",
    "KINDS",
    "SCANNERS",
    "SHARES_OF_B",
    "SIZE_PX",
    "TOKEN_PX",
    "Cohort",
    "Scanner",
    "draw_cohort",
    "draw_slide",
]

GRADES = 6
SIZE_PX = (256, 384)
TOKEN_PX = 8
GRID_HW = (SIZE_PX[0] // TOKEN_PX, SIZE_PX[1] // TOKEN_PX)
KINDS = ("glass", "mark", "benign", "pattern A", "pattern B")
_GLASS, _MARK, _BENIGN, _A, _B = range(len(KINDS))
SHARES_OF_B = ((0.0, 0.0), (0.0, 0.0), (0.05, 0.35), (0.35, 0.65), (0.65, 0.95), (1.0, 1.0))  # least, most; by grade
LESION_SHARE = (0.06, 0.45)  # share of the tissue
_RELIABLE = 0.9  # share of informative marks that agree with the grade
_INKS = ((35, 80, 175), (40, 45, 50))  # inks of marks for grades up to 2, and above
_FREE_PX = 12  # distance of marks from tissue, so that no token holds both


@dataclass(frozen=True)
class Scanner:
    """The rendering of slides by a scanner.

    Attributes:
        tint: (2, 3) changes of the optical densities of haematoxylin and eosin.
        strength: strengths of the two stains.
        blur_px: standard deviation of its blur in px.
        lamp: share of the light that reaches each colour.
    """

    tint: tuple[tuple[float, float, float], tuple[float, float, float]]
    strength: tuple[float, float]
    blur_px: float
    lamp: tuple[float, float, float]


SCANNERS = {
    "inside": Scanner(((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (1.45, 0.85), 0.35, (0.99, 0.99, 0.99)),
    "outside": Scanner(((0.06, -0.04, 0.05), (0.05, -0.06, 0.05)), (1.30, 0.95), 0.75, (0.98, 0.96, 0.93)),
}


@dataclass(frozen=True)
class Cohort:
    """Slides and their ground truth.

    Attributes:
        images_S3XY: (S, 3, X, Y) uint8 RGB.
        shares_SMHW: (S, M, H, W) float16, the share of each of :data:`KINDS` in each token's pixels.
        patients_S: (S,), numbers of the patients.
        grades_S: (S,), grades.
    """

    images_S3XY: ByteArray
    shares_SMHW: np.ndarray
    patients_S: np.ndarray
    grades_S: np.ndarray

    @property
    def tissue(self) -> np.ndarray:
        """(S, H, W) bool: tokens with tissue."""
        return self.shares_SMHW[:, _BENIGN:].sum(axis=1) > 0

    def pattern(self, *kinds: str) -> np.ndarray:
        """Return (S, H, W) bool: the tokens that consist at least half of these kinds."""
        return self.shares_SMHW[:, [KINDS.index(kind) for kind in kinds]].sum(axis=1) >= 0.5


def draw_cohort(
    seed: int,
    patients: int,
    scanner: str,
    *,
    marks_tell: bool,
    over_tissue: bool = False,
    slides_a_patient: Sequence[int] = (2, 2),
) -> Cohort:
    """Draw patients of all grades in turn, each with several slides; the same arguments draw the same cohort.

    Args:
        seed: seed of every choice; the tissue is the same whatever the scanner and the marks.
        patients: number of patients.
        scanner: a key of :data:`SCANNERS`.
        marks_tell: whether pen marks are informative of the grade.
        over_tissue: whether pens also run over the tissue, instead of over glass only.
        slides_a_patient: least and largest number of slides of a patient.
    """
    images, shares, numbers, grades = [], [], [], []
    for patient in range(patients):
        rng = np.random.default_rng([seed, patient])
        grade = patient % GRADES
        for _ in range(int(rng.integers(slides_a_patient[0], slides_a_patient[1] + 1))):
            slide_seed = int(rng.integers(2**31))
            image, kinds = draw_slide(slide_seed, grade, scanner, marks_tell=marks_tell, over_tissue=over_tissue)
            images.append(image.transpose(2, 0, 1))
            shares.append(_shares(kinds))
            numbers.append(patient)
            grades.append(grade)
    return Cohort(np.stack(images), np.stack(shares), np.array(numbers), np.array(grades))


def draw_slide(
    seed: int, grade: int, scanner: str, *, marks_tell: bool, over_tissue: bool = False
) -> tuple[ByteArray, ByteArray]:
    """Draw one slide, (X, Y, 3) uint8, and the kind of each pixel, (X, Y) uint8, an index into :data:`KINDS`."""
    tissue, kinds, canvas, state = _tissue_of(seed, grade)
    rng, marks = np.random.default_rng(0), np.random.default_rng([seed, 1])
    rng.bit_generator.state = state
    kinds = kinds.copy()
    image = _develop(rng, canvas, tissue, SCANNERS[scanner])
    dirt, ink = _marks(marks, grade, tissue, marks_tell, over_tissue)
    image = cv2.multiply(image, cv2.merge([dirt] * 3), scale=1 / 255)
    if ink is not None:
        colour, cover = ink
        tones = [cv2.subtract(255, cv2.multiply(cover, 255 - tone, scale=1 / 255)) for tone in colour]
        image = cv2.multiply(image, cv2.merge(tones), scale=1 / 255)
        kinds[(cover > 60) & (tissue == 0)] = _MARK
    noise = cv2.merge([marks.integers(0, 6, SIZE_PX, dtype=np.uint8)] * 3)
    return cv2.subtract(image, noise), kinds


@functools.lru_cache(maxsize=512)
def _tissue_of(seed: int, grade: int) -> tuple[ByteArray, ByteArray, Canvas, Any]:
    """Draw the tissue (X, Y), the kind of each pixel and its stains; also return the generator's state afterwards.

    Results are cached, since a slide is drawn for several scanners and pens.
    """
    rng = np.random.default_rng([seed, 0])
    tissue = _strip(rng)
    kinds = np.where(tissue > 0, _BENIGN, _GLASS).astype(np.uint8)
    lesion_share, share_of_b = rng.uniform(*LESION_SHARE), rng.uniform(*SHARES_OF_B[grade])
    where, which = (smooth_noise(rng, *SIZE_PX, cell) for cell in (70, 40))
    if grade:
        lesion = (tissue > 0) & (where > np.quantile(where[tissue > 0], 1 - lesion_share))
        kinds[lesion] = _A
        if share_of_b > 0:
            kinds[lesion & (which >= np.quantile(which[lesion], 1 - share_of_b))] = _B
    return tissue, kinds, _paint(rng, kinds), rng.bit_generator.state


def _shares(kinds: ByteArray) -> np.ndarray:
    """Compute the share of each kind in each token, (M, H, W) float16, from (X, Y) kinds."""
    each = (kinds[None] == np.arange(len(KINDS), dtype=np.uint8)[:, None, None]).astype(np.float32)
    cut = each.reshape(len(KINDS), GRID_HW[0], TOKEN_PX, GRID_HW[1], TOKEN_PX)
    return cut.mean(axis=(2, 4)).astype(np.float16)


def _strip(rng: np.random.Generator) -> ByteArray:
    """Draw (X, Y) uint8, 255 on one wavy strip that does not touch the slide's edge."""
    height, width = SIZE_PX
    length, thickness = rng.uniform(210, 320), int(rng.integers(44, 70))
    along = np.linspace(-0.5, 0.5, 40)
    wave = rng.normal(0, 6) * np.sin(along * rng.uniform(4, 9) + rng.uniform(0, 6))
    tilt = rng.uniform(-0.35, 0.35)
    room_y = max(0.0, height / 2 - thickness / 2 - 22 - abs(np.sin(tilt)) * length / 2)
    room_x = max(0.0, width / 2 - thickness / 2 - 8 - np.cos(tilt) * length / 2)
    x = width / 2 + rng.uniform(-room_x, room_x) + along * length * np.cos(tilt)
    y = height / 2 + rng.uniform(-room_y, room_y) + along * length * np.sin(tilt) + wave
    coarse = np.zeros(SIZE_PX, np.uint8)
    cv2.polylines(coarse, [np.rint(np.stack([x, y], 1)).astype(np.int32)], False, 255, thickness)
    edge = smooth_noise(rng, height, width, 10) + smooth_noise(rng, height, width, 34)
    soft = cv2.GaussianBlur(coarse, (0, 0), 4)
    tissue = np.where(soft + 22 * edge * (soft > 0) > 128, 255, 0).astype(np.uint8)
    return cv2.morphologyEx(tissue, cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))


def _paint(rng: np.random.Generator, kinds: ByteArray) -> Canvas:
    """Paint stroma everywhere, round glands in benign tissue, small crowded ones in A, and sheets of nuclei in B."""
    canvas = Canvas.blank(*SIZE_PX)
    strands, _ = fibres(rng, *SIZE_PX)
    np.copyto(canvas.eosin, np.clip(92 + 17 * strands, 20, 220).astype(np.uint8))
    np.copyto(canvas.haematoxylin, np.clip(12 + 4 * strands, 0, 60).astype(np.uint8))
    _nuclei(rng, canvas, kinds == _BENIGN, spacing=9.0, radius=(0.8, 1.2), darkness=(110, 170))
    room = cv2.distanceTransform((kinds == _BENIGN).astype(np.uint8), cv2.DIST_L2, 3)
    for centre in hexagonal_points(rng, *SIZE_PX, 21, 0.2):
        radius = min(rng.uniform(6, 9), float(_at(room, centre[None])[0]) - 1)
        if radius > 4.5:
            _gland(rng, canvas, centre, radius, lumen=rng.uniform(0.45, 0.62), ring=(115, 165), cytoplasm=(26, 105))
    for centre in hexagonal_points(rng, *SIZE_PX, 8.6, 0.18):
        if _at(kinds, centre[None])[0] == _A:
            lumen = rng.uniform(0.2, 0.4)
            _gland(rng, canvas, centre, rng.uniform(3.0, 4.6), lumen=lumen, ring=(125, 200), cytoplasm=(44, 95))
    sheet = kinds == _B
    canvas.nuclei[sheet] = 0
    canvas.haematoxylin[sheet], canvas.eosin[sheet] = 40, 88
    _nuclei(rng, canvas, sheet, spacing=4.3, radius=(0.9, 1.8), darkness=(110, 200))
    return canvas


def _nuclei(
    rng: np.random.Generator,
    canvas: Canvas,
    where: np.ndarray,
    spacing: float,
    radius: tuple[float, float],
    darkness: tuple[float, float],
) -> None:
    points = hexagonal_points(rng, *SIZE_PX, spacing, 0.4)
    points = points[_at(where, points)]
    axes = rng.uniform(*radius, (len(points), 2)).astype(np.float32)
    angles, tones = rng.uniform(0, np.pi, len(points)), rng.uniform(*darkness, len(points))
    paint_nuclei(canvas.nuclei, points, axes, angles, tones)


def _at(layer: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the (P,) values of a layer at (P, 2) points, clipping those that rounding has moved to the far edge."""
    x, y = np.minimum(points.astype(int), (SIZE_PX[1] - 1, SIZE_PX[0] - 1)).T
    return layer[y, x]


def _gland(
    rng: np.random.Generator,
    canvas: Canvas,
    centre: np.ndarray,
    radius: float,
    lumen: float,
    ring: tuple[float, float],
    cytoplasm: tuple[int, int],
) -> None:
    """Paint a ring of nuclei around a lumen."""
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    wave = 1 + rng.uniform(0.02, 0.14) * np.cos(angle * rng.integers(2, 5) + rng.uniform(0, 6))
    outline = np.stack([np.cos(angle), np.sin(angle)], 1) * (radius * wave)[:, None]
    rim = 1 - min(0.4, 2.2 / radius)  # the ring is about two pixels wide
    fill(canvas.nuclei, centre + outline, int(rng.uniform(*ring)))
    fill(canvas.nuclei, centre + rim * outline, 0)
    fill(canvas.haematoxylin, centre + outline, cytoplasm[0])
    fill(canvas.eosin, centre + outline, cytoplasm[1])
    for layer in (canvas.haematoxylin, canvas.eosin):
        fill(layer, centre + lumen * outline, 0)


def _develop(rng: np.random.Generator, canvas: Canvas, tissue: ByteArray, scanner: Scanner) -> ByteArray:
    """Clip the canvas to the tissue, stain it, and render it as the scanner does."""
    grain = rng.integers(190, 256, SIZE_PX, dtype=np.uint8)
    haematoxylin = cv2.add(canvas.haematoxylin, cv2.multiply(canvas.nuclei, grain, scale=1 / 235))
    inside = cv2.GaussianBlur(tissue, (0, 0), 0.7)
    inside[tissue == 0] = 0
    layers = [cv2.multiply(layer, inside, scale=1 / 255) for layer in (haematoxylin, canvas.eosin)]
    strength = tuple(s * rng.uniform(0.92, 1.08) for s in scanner.strength)
    image = stain(layers[0], layers[1], np.array(scanner.tint) + rng.normal(0, 0.02, (2, 3)), strength)
    blurred = cv2.GaussianBlur(image, (0, 0), scanner.blur_px)
    lamp = np.array(scanner.lamp) * rng.uniform(0.975, 1.0)
    return np.clip(blurred * lamp, 0, 255).astype(np.uint8)


def _marks(
    rng: np.random.Generator, grade: int, tissue: ByteArray, tell: bool, over_tissue: bool
) -> tuple[ByteArray, tuple[tuple[int, int, int], ByteArray] | None]:
    """Draw the light transmitted by dust and coverslip edges (X, Y), and a pen's colour and cover (X, Y), or None."""
    height, width = SIZE_PX
    window = np.ones((2 * _FREE_PX + 1,) * 2, np.uint8)
    glass = cv2.dilate(tissue, window) == 0
    dirt = np.full(SIZE_PX, 255, np.uint8)
    specks = (rng.uniform(0, 1, (rng.integers(8, 40), 2)) * (width, height)).astype(np.float32)
    axes = np.exp(rng.normal(0, 0.4, specks.shape)).astype(np.float32)
    paint_nuclei(dirt, specks, axes, rng.uniform(0, np.pi, len(specks)), rng.uniform(60, 200, len(specks)))
    if rng.random() < 0.4:
        row = int(rng.integers(6, 20)) if rng.random() < 0.5 else height - int(rng.integers(6, 20))
        cv2.line(dirt, (0, row), (width, row + int(rng.integers(-4, 5))), int(rng.integers(150, 205)), 2, cv2.LINE_AA)
    dirt[~glass] = 255
    any_grade, reliable = int(rng.integers(GRADES)), rng.random() < _RELIABLE
    marked_as = grade if tell and reliable else any_grade
    cover = np.zeros(SIZE_PX, np.uint8)
    angle = np.linspace(0, marked_as * rng.uniform(0.8, 1.0), 40)[:, None]
    radius, start = rng.uniform(24, 40, 2), rng.uniform(0, 2 * np.pi)
    # marks are near the tissue that they point at
    nearby = np.argwhere((cv2.dilate(tissue, np.ones((91, 91), np.uint8)) > 0) & glass)
    centre = nearby[rng.integers(len(nearby))][::-1]
    line = centre + np.concatenate([np.cos(angle + start), np.sin(angle + start)], 1) * radius
    cv2.polylines(cover, [np.rint(line).astype(np.int32)], False, 230, int(rng.integers(6, 11)))
    cover = cv2.GaussianBlur(cover, (0, 0), 1.0)
    if not over_tissue:
        cover[~glass] = 0
    colour = tuple(int(np.clip(tone + rng.integers(-12, 13), 0, 255)) for tone in _INKS[int(marked_as > 2)])
    return dirt, ((colour[0], colour[1], colour[2]), cover) if marked_as else None
