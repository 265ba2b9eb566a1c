"""Synthetic H&E slides with a known answer, at 1 µm per pixel.

There are three classes. *benign* has large round glands with an open lumen and one regular ring of nuclei. *low* is
benign tissue with regions of small, crowded, fused glands with more nuclei. *high* is benign tissue with regions
without lumens, of sheets and cords of large, dark, uneven nuclei. Stain, brightness, inflammation, dust, pen marks and
coverslip edges are drawn independently of the class, and marks are only on glass, so that only the lesion reveals the
class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile

from maskattn.demo.textures import (
    ByteArray,
    Canvas,
    FloatArray,
    Gland,
    blob,
    fibres,
    fill,
    hexagonal_points,
    paint_gland,
    paint_nuclei,
    rotation,
    smooth_noise,
    stain,
)
from maskattn.shapes import Bool, UInt8

__all__ = ["CLASSES", "SPACING_UM", "SyntheticSlide", "make_slide", "write_slide"]

CLASSES = ("benign", "low", "high")
SPACING_UM = 1.0
TISSUE_SHARE = (0.20, 0.45)

BENIGN_GLAND = Gland(
    radius=(34, 62),
    lumen=(0.45, 0.68),
    waviness=0.16,
    rows=(0.0,),
    nucleus_spacing=8.0,
    nucleus=(3.6, 2.7),
    irregularity=0.3,
    darkness=(115, 165),
    cytoplasm=(22, 105),
)
LOW_GLAND = Gland(
    radius=(17, 27),
    lumen=(0.20, 0.40),
    waviness=0.22,
    rows=(0.0, 0.45),
    nucleus_spacing=7.8,
    nucleus=(3.7, 2.6),
    irregularity=0.55,
    darkness=(105, 165),
    cytoplasm=(38, 100),
)
STROKE_MARGIN = 16  # px
PENS = ((30, 60, 170), (25, 120, 70), (35, 35, 40))


@dataclass(frozen=True)
class SyntheticSlide:
    """A slide and its ground truth.

    Attributes:
        image_HW3: (H, W, 3) uint8 RGB.
        tissue_HW: (H, W) bool, True on tissue, lumens included.
        lesion_HW: (H, W) bool, True in lesions; all False if the label is benign.
        label: index into :data:`CLASSES`.
        spacing_um: µm per pixel.
    """

    image_HW3: UInt8[np.ndarray, "H W 3"]
    tissue_HW: Bool[np.ndarray, "H W"]
    lesion_HW: Bool[np.ndarray, "H W"]
    label: int
    spacing_um: float = SPACING_UM


def make_slide(seed: int, label: int | None = None, size_px: int = 2048) -> SyntheticSlide:
    """Draw one slide; the same arguments draw the same slide.

    Args:
        seed: seed of every random choice.
        label: index into :data:`CLASSES`; None draws it at random.
        size_px: width and height in pixels.

    Raises:
        ValueError: the label is not one of the classes, or the slide is too small to hold a lesion.
    """
    if label is not None and not 0 <= label < len(CLASSES):
        raise ValueError(f"label must index {CLASSES}, got label={label}; give 0, 1, 2 or None")
    if size_px < 768:
        raise ValueError(
            f"a slide must be at least 768 px wide to hold a lesion, got size_px={size_px}; make it larger"
        )
    rng = np.random.default_rng(seed)
    drawn = int(rng.integers(len(CLASSES)))
    label = drawn if label is None else label
    tissue = draw_tissue(rng, size_px)
    # drawn for every class, so that the generator's state afterwards does not depend on the class
    lesion = draw_lesions(rng, tissue)
    if label == 0:
        lesion[:] = 0
    canvas = paint_stroma(rng, tissue)
    paint_benign(rng, canvas, tissue, lesion)
    if label == 1:
        paint_low(rng, canvas, lesion)
    if label == 2:
        paint_high(rng, canvas, lesion)
    image = develop(rng, canvas, tissue)
    mark_glass(rng, image, tissue)
    return SyntheticSlide(image, tissue > 0, lesion > 0, label)


def draw_tissue(rng: np.random.Generator, size: int) -> ByteArray:
    """Draw (H, W) uint8, 255 on one to four pieces of tissue that cover 20 to 45 % of the slide."""
    small = size // 8
    while True:
        coarse = np.zeros((small, small), np.uint8)
        for _ in range(rng.integers(1, 5)):
            piece = blob(rng, small * rng.uniform(0.16, 0.30), elongation=rng.uniform(1.0, 2.6), roughness=0.3)
            fill(coarse, piece + rng.uniform(0.22 * small, 0.78 * small, 2), 255)
        margin = np.concatenate([coarse[[0, -1]].ravel(), coarse[:, [0, -1]].ravel()])
        roomy = cv2.distanceTransform(coarse, cv2.DIST_L2, 3).max() * 8 > 150
        if roomy and (margin > 0).mean() < 0.05 and TISSUE_SHARE[0] < (coarse > 0).mean() < TISSUE_SHARE[1]:
            break
    edge = smooth_noise(rng, size, size, 24)
    edge += smooth_noise(rng, size, size, 90)
    edge *= 22
    edge += cv2.resize(cv2.GaussianBlur(coarse, (0, 0), 2), (size, size))
    tissue = (edge > 128).view(np.uint8) * np.uint8(255)
    return cv2.morphologyEx(tissue, cv2.MORPH_OPEN, np.ones((25, 25), np.uint8))


def draw_lesions(rng: np.random.Generator, tissue: ByteArray) -> ByteArray:
    """Draw (H, W) uint8, 255 in one to three regions well inside the tissue that cover at most half of it."""
    size = tissue.shape[0]
    lesion = np.zeros_like(tissue)
    depth = cv2.distanceTransform(tissue[::8, ::8], cv2.DIST_L2, 3) * 8
    for _ in range(rng.integers(1, 4)):
        rows, cols = np.nonzero(depth > min(110.0, 0.8 * depth.max()))
        pick = rng.integers(len(rows))
        outline = blob(rng, rng.uniform(100, max(100, 0.13 * size)), elongation=rng.uniform(1.0, 1.8), roughness=0.2)
        grown = lesion.copy()
        fill(grown, outline + 8 * np.array([cols[pick], rows[pick]]), 255)
        grown &= cv2.erode(tissue, np.ones((9, 9), np.uint8))
        if (grown > 0).sum() < 0.5 * (tissue > 0).sum() or not lesion.any():
            lesion = grown
    return lesion


def paint_stroma(rng: np.random.Generator, tissue: ByteArray) -> Canvas:
    """Paint connective tissue: wavy pink fibres, spindle nuclei along them, patches of inflammation, a few clefts."""
    height, width = tissue.shape
    canvas = Canvas.blank(height, width)
    strands, direction = fibres(rng, height, width)
    patchy = smooth_noise(rng, height, width, 160)
    paint_fibres(canvas.eosin, (92, 17 * strands, 10 * patchy), (20, 220))
    paint_fibres(canvas.haematoxylin, (10, 4 * strands, 3 * patchy), (0, 60))
    clefts = (strands > 2.1) & (patchy > 0.4)
    canvas.eosin[clefts] = 12
    spindle = hexagonal_points(rng, height, width, 30, 0.5)
    spindle = spindle[at(tissue, spindle) > 0]
    count = len(spindle)
    axes = np.stack([rng.uniform(4.5, 9.0, count), rng.uniform(1.1, 1.9, count)], 1).astype(np.float32)
    angle = at(direction, spindle) + rng.normal(0, 0.25, count)
    paint_nuclei(canvas.nuclei, spindle, axes, angle, rng.uniform(105, 175, count))
    inflamed = smooth_noise(rng, height, width, 130) > rng.uniform(1.7, 2.6)
    cells = hexagonal_points(rng, height, width, 9.5, 0.45)
    cells = cells[(at(tissue, cells) > 0) & at(inflamed, cells)]
    cells = cells[rng.random(len(cells)) < 0.75]
    axes = np.repeat(rng.uniform(2.3, 3.1, (len(cells), 1)), 2, axis=1).astype(np.float32)
    paint_nuclei(canvas.nuclei, cells, axes, np.zeros(len(cells)), rng.uniform(170, 225, len(cells)))
    return canvas


def paint_fibres(layer: ByteArray, summands: tuple[int, FloatArray, FloatArray], limits: tuple[int, int]) -> None:
    """Paint a layer with the sum of a level and of two fields, within limits; the first field is used up."""
    level, field, other = summands
    field += level
    field += other
    np.copyto(layer, np.clip(field, *limits, out=field), casting="unsafe")


def paint_benign(rng: np.random.Generator, canvas: Canvas, tissue: ByteArray, lesion: ByteArray) -> None:
    """Paint large glands over the tissue outside lesions, with stretches of bare stroma between them."""
    height, width = tissue.shape
    room = cv2.distanceTransform(np.where(lesion > 0, 0, tissue)[::4, ::4].astype(np.uint8), cv2.DIST_L2, 3) * 4
    bare = smooth_noise(rng, height, width, 300) < -0.7
    for centre in hexagonal_points(rng, height, width, 118, 0.2):
        radius = min(rng.uniform(*BENIGN_GLAND.radius), float(at(room, centre[None] / 4)[0]) - 8)
        if radius >= BENIGN_GLAND.radius[0] and not at(bare, centre[None])[0]:
            paint_gland(rng, canvas, centre, radius, BENIGN_GLAND)


def paint_low(rng: np.random.Generator, canvas: Canvas, lesion: ByteArray) -> None:
    """Paint small crowded glands that touch and fuse over the lesion."""
    for centre in hexagonal_points(rng, lesion.shape[0], lesion.shape[1], 43, 0.2):
        if at(lesion, centre[None])[0]:
            paint_gland(rng, canvas, centre, rng.uniform(*LOW_GLAND.radius), LOW_GLAND)


def paint_high(rng: np.random.Generator, canvas: Canvas, lesion: ByteArray) -> None:
    """Paint sheets and cords of large, dark, uneven nuclei without lumens over the lesion."""
    height, width = lesion.shape
    bands = smooth_noise(rng, height, width, 55) + 0.4 * smooth_noise(rng, height, width, 18)
    sheet = (lesion > 0) & (bands > -0.75)
    canvas.nuclei[sheet] = 0
    canvas.haematoxylin[sheet] = 34
    canvas.eosin[sheet] = 92
    cells = hexagonal_points(rng, height, width, 13.5, 0.34)
    cells = cells[at(sheet, cells)]
    count = len(cells)
    size = np.clip(np.exp(rng.normal(np.log(4.7), 0.32, count)), 2.6, 9.0)
    stretch = rng.uniform(1.0, 1.55, count)
    axes = np.stack([size * stretch**0.5, size / stretch**0.5], 1).astype(np.float32)
    angle = rng.uniform(0, np.pi, count)
    darkness = rng.uniform(120, 225, count)
    paint_nuclei(canvas.nuclei, cells, axes, angle, darkness)
    vesicular = size > 4.5
    paint_nuclei(canvas.nuclei, cells[vesicular], axes[vesicular] * 0.6, angle[vesicular], darkness[vesicular] - 45)
    nucleoli = rng.random(count) < 0.35
    spot = np.full((int(nucleoli.sum()), 2), 1.4, np.float32)
    paint_nuclei(canvas.nuclei, cells[nucleoli], spot, angle[nucleoli], darkness[nucleoli] + 45)


def develop(rng: np.random.Generator, canvas: Canvas, tissue: ByteArray) -> ByteArray:
    """Add chromatin texture and unevenness to the canvas, clip it to the tissue and stain it: (H, W, 3) uint8."""
    height, width = tissue.shape
    grain = rng.integers(190, 256, (height, width), dtype=np.uint8)
    nuclei = cv2.GaussianBlur(cv2.multiply(canvas.nuclei, grain, scale=1 / 235), (0, 0), 0.8)
    haematoxylin = cv2.add(cv2.GaussianBlur(canvas.haematoxylin, (0, 0), 1.2), nuclei)
    eosin = cv2.multiply(cv2.GaussianBlur(canvas.eosin, (0, 0), 1.0), grain, scale=1 / 225)
    thickness = uneven(smooth_noise(rng, height, width, 220), 128, 14, (80, 180)).astype(np.uint8)
    thickness = cv2.multiply(thickness, cv2.GaussianBlur(tissue, (0, 0), 1.5), scale=1 / 255)
    haematoxylin = cv2.multiply(haematoxylin, thickness, scale=1 / 128)
    eosin = cv2.multiply(eosin, thickness, scale=1 / 128)
    strength = (rng.uniform(1.15, 1.65), rng.uniform(0.65, 1.05))
    image = stain(haematoxylin, eosin, rng.normal(0, 0.05, (2, 3)), strength)
    lamp = uneven(smooth_noise(rng, height, width, width / 2), 246, 2, (238, 252))
    lamp *= rng.uniform(0.95, 1.0)
    channels = np.empty((3, height, width), np.uint8)
    for channel, tone in zip(channels, rng.uniform(0.985, 1.0, 3), strict=True):
        np.multiply(lamp, tone, out=channel, dtype=np.float64, casting="unsafe")
    light = cv2.merge(list(channels))
    noise = cv2.merge([rng.integers(0, 6, (height, width), dtype=np.uint8)] * 3)
    cv2.multiply(image, light, image, scale=1 / 255)
    return cv2.subtract(image, noise, image)


def uneven(noise: FloatArray, mean: int, amplitude: int, limits: tuple[int, int]) -> FloatArray:
    """Scale noise to a mean and an amplitude, within limits; its memory is reused."""
    noise *= amplitude
    noise += mean
    return np.clip(noise, *limits, out=noise)


def mark_glass(rng: np.random.Generator, image: ByteArray, tissue: ByteArray) -> None:
    """Draw dust, coverslip edges and pen marks on glass only; the image is changed in place."""
    height, width = tissue.shape
    glass = cv2.dilate(tissue, np.ones((41, 41), np.uint8)) == 0
    shade = np.full((height, width), 255, np.uint8)
    specks = rng.uniform(0, 1, (rng.integers(30, 160), 2)) * (width, height)
    axes = np.exp(rng.normal(0.5, 0.6, specks.shape)).astype(np.float32)
    angles = rng.uniform(0, np.pi, len(specks))
    paint_nuclei(shade, specks.astype(np.float32), axes, angles, rng.uniform(60, 210, len(specks)))
    for _ in range(rng.integers(0, 3)):
        start, heading = rng.uniform(0, 1, 2) * (width, height), rng.normal(0, 0.06) + rng.choice([0, np.pi / 2])
        offset = 2 * max(height, width) * np.array([np.cos(heading), np.sin(heading)])
        line = [np.rint(end).astype(int).tolist() for end in (start - offset, start + offset)]
        cv2.line(shade, line[0], line[1], int(rng.integers(150, 205)), int(rng.integers(3, 8)), cv2.LINE_AA)
        cv2.line(shade, line[0], line[1], 235, 1, cv2.LINE_AA)
    shade = cv2.GaussianBlur(shade, (0, 0), 0.9)
    shade[~glass] = 255
    cv2.multiply(image, cv2.merge([shade] * 3), image, scale=1 / 255)
    for _ in range(rng.integers(0, 4)):
        stroke, box = draw_stroke(rng, glass)
        ink = np.array(PENS[rng.integers(len(PENS))]) + rng.integers(-15, 16, 3)
        cover = cv2.GaussianBlur(stroke[box], (0, 0), 2.0)
        tones = [
            cv2.subtract(255, cv2.multiply(cover, int(255 - tone), scale=1 / 255)) for tone in np.clip(ink, 0, 255)
        ]
        image[box] = cv2.multiply(np.ascontiguousarray(image[box]), cv2.merge(tones), scale=1 / 255)


def draw_stroke(rng: np.random.Generator, glass: Bool[np.ndarray, "H W"]) -> tuple[ByteArray, tuple[slice, slice]]:
    """Draw (H, W) uint8, the ink of one curved pen stroke that stays on glass; all 0 if there is no room for one.

    Returns:
        The ink, and the rows and columns of its surroundings, which its blurred edge does not leave.
    """
    height, width = glass.shape
    for _ in range(12):
        angle = np.linspace(0, rng.uniform(0.4, 4.5), 60)[:, None]
        loop = np.concatenate([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.03, 0.20, 2) * width
        line = (loop + angle * rng.normal(0, 0.06, 2) * width) @ rotation(rng.uniform(0, 2 * np.pi))
        line += rng.uniform(0.05, 0.95, 2) * (width, height)
        stroke = np.zeros((height, width), np.uint8)
        cv2.polylines(
            stroke, [np.rint(line).astype(np.int32)], False, int(rng.integers(170, 250)), int(rng.integers(10, 28))
        )
        left, top, across, down = cv2.boundingRect(stroke)
        box = (
            slice(max(0, top - STROKE_MARGIN), top + down + STROKE_MARGIN),
            slice(max(0, left - STROKE_MARGIN), left + across + STROKE_MARGIN),
        )
        if not (cv2.dilate(stroke[box], np.ones((15, 15), np.uint8))[~glass[box]]).any():
            return stroke, box
    return np.zeros((height, width), np.uint8), (slice(1), slice(1))


def at(layer: np.ndarray, points: FloatArray) -> np.ndarray:
    """Return the (M,) values of a layer (H, W) at (M, 2) points."""
    rows = np.clip(points[:, 1].astype(int), 0, layer.shape[0] - 1)
    cols = np.clip(points[:, 0].astype(int), 0, layer.shape[1] - 1)
    return layer[rows, cols]


def write_slide(slide: SyntheticSlide, path: Path | str, levels: int = 3) -> Path:
    """Write a tiled pyramidal TIFF that openslide reads, in which each level has half the size of the one before.

    Deflate is lossless and needs no package besides tifffile. The resolution tags hold the spacing.
    """
    path = Path(path)
    image = slide.image_HW3
    with tifffile.TiffWriter(path, bigtiff=False) as tiff:
        for level in range(levels):
            per_cm = 1e4 / (slide.spacing_um * 2**level)
            tiff.write(
                image,
                photometric="rgb",
                tile=(256, 256),
                compression="zlib",
                compressionargs={"level": 1},  # noise hardly shrinks further with more effort
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
                software="maskattn",
                metadata=None,
            )
            image = cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return path
