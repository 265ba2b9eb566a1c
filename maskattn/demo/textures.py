"""Textures of synthetic H&E slides: stain densities, tissue shapes, glands, nuclei and the marks on the glass.

Everything is painted as two stain densities, haematoxylin (nuclei, blue-violet) and eosin (everything else, pink), and
converted to RGB by the Beer–Lambert law in :func:`stain`. 1 px is 1 µm; shapes are (H, W); points are (x, y).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ByteArray",
    "Canvas",
    "FloatArray",
    "Gland",
    "blob",
    "fibres",
    "fill",
    "hexagonal_points",
    "paint_gland",
    "paint_nuclei",
    "rotation",
    "smooth_noise",
    "stain",
]

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]
Points = NDArray[np.floating]

# optical densities per unit of stain in red, green and blue (Ruifrok and Johnston's vectors, unit length)
HAEMATOXYLIN_OD = np.array([0.65, 0.70, 0.29])
EOSIN_OD = np.array([0.07, 0.99, 0.11])
SUBPIXEL_BITS = 4
ROWS_AT_ONCE = 64  # of arithmetic whose intermediate results then stay in a core's cache


@dataclass(frozen=True)
class Canvas:
    """The stain densities of a slide while it is painted, each (H, W) uint8: 255 is the densest stain that occurs.

    Attributes:
        nuclei: haematoxylin of the nuclei, kept apart so that chromatin texture can be added to them later.
        haematoxylin: haematoxylin of everything else.
        eosin: eosin.
    """

    nuclei: ByteArray
    haematoxylin: ByteArray
    eosin: ByteArray

    @classmethod
    def blank(cls, height: int, width: int) -> Canvas:
        """Return a canvas without any stain."""
        return cls(*(np.zeros((height, width), np.uint8) for _ in range(3)))


@dataclass(frozen=True)
class Gland:
    """The appearance of one kind of gland; lengths in px (= µm); two numbers are (smallest, largest).

    Attributes:
        radius: outer radius.
        lumen: radius of the open lumen as a share of the outer radius.
        waviness: relative amplitude of the outline's waves.
        rows: positions of the rings of nuclei between the outline (0) and the lumen (1).
        nucleus_spacing: distance between neighbouring nuclei of a ring.
        nucleus: half axes of a nucleus, along and across the radius.
        irregularity: relative scatter of the nuclei's size and position.
        darkness: stain density of nuclei.
        cytoplasm: (haematoxylin, eosin) of the epithelium.
    """

    radius: tuple[float, float]
    lumen: tuple[float, float]
    waviness: float
    rows: tuple[float, ...]
    nucleus_spacing: float
    nucleus: tuple[float, float]
    irregularity: float
    darkness: tuple[float, float]
    cytoplasm: tuple[int, int]


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell_px: float) -> FloatArray:
    """Draw (H, W) noise of mean 0 and standard deviation about 1 whose features are about ``cell_px`` wide."""
    # cubic interpolation at a quarter of the size is several times faster, and accurate enough for a smooth field
    shrink = 4 if cell_px >= 16 else 1
    step = cell_px / shrink
    inner = (-(-height // shrink), -(-width // shrink))
    rows, cols = (int(np.ceil(side / step)) + 3 for side in inner)
    coarse = rng.standard_normal((rows, cols), dtype=np.float32)
    grown = cv2.resize(coarse, (int(cols * step), int(rows * step)), interpolation=cv2.INTER_CUBIC)
    field = grown[: inner[0], : inner[1]]
    field *= np.float32(1.3)
    return field if shrink == 1 else cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR)


def blob(rng: np.random.Generator, radius: float, elongation: float = 1.0, roughness: float = 0.25) -> FloatArray:
    """Draw the (96, 2) outline of a rounded random shape around (0, 0)."""
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    waves = np.arange(1, 8)
    amplitude = roughness * rng.standard_normal(7) / waves**1.1
    phase = rng.uniform(0, 2 * np.pi, 7)
    distance = radius * np.exp((amplitude * np.cos(angle[:, None] * waves + phase)).sum(1))
    points = np.stack([distance * np.cos(angle) * elongation**0.5, distance * np.sin(angle) / elongation**0.5], 1)
    return (points @ rotation(rng.uniform(0, np.pi))).astype(np.float32)


def rotation(angle: float) -> NDArray[np.float64]:
    """Return the (2, 2) matrix that rotates row vectors by ``angle`` radians."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def fill(layer: ByteArray, points: NDArray[np.floating], value: int) -> None:
    """Fill the polygon (P, 2) with ``value``, at sub-pixel positions."""
    cv2.fillPoly(layer, [np.rint(points * 2**SUBPIXEL_BITS).astype(np.int32)], value, shift=SUBPIXEL_BITS)


def fibres(rng: np.random.Generator, height: int, width: int) -> tuple[FloatArray, FloatArray]:
    """Draw wavy collagen: (H, W) noise stretched along a slowly varying direction, and that direction in radians."""
    side = 512
    strands = cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), sigmaX=14, sigmaY=1.2)
    strands /= strands.std()
    cell = max(height, width) / 5
    bend_y, bend_x = (smooth_noise(rng, height, width, cell) for _ in range(2))
    for bend in (bend_y, bend_x):
        bend *= np.float32(0.45 * cell)
    # strands lie along level sets of y + bend_y
    small = cv2.resize(bend_y, (width // 16, height // 16), interpolation=cv2.INTER_AREA)
    y, x = np.ogrid[:height, :width]
    for rows in (slice(first, first + ROWS_AT_ONCE) for first in range(0, height, ROWS_AT_ONCE)):
        bend_x[rows] = modulo(x + bend_x[rows], side - 1)
        bend_y[rows] = modulo(y[rows] + bend_y[rows], side - 1)
    wavy = cv2.remap(strands, bend_x, bend_y, 1)
    slope_x = cv2.Sobel(small, cv2.CV_32F, 1, 0, scale=1 / 128)
    slope_y = cv2.Sobel(small, cv2.CV_32F, 0, 1, scale=1 / 128)
    direction = np.arctan2(-slope_x, 1 + slope_y)
    return wavy, cv2.resize(direction, (width, height))


def modulo(values: NDArray[np.float64], period: int) -> NDArray[np.float64]:
    """Return ``np.mod(values, period)`` in a third of its time; the values are overwritten."""
    turns = np.divide(values, period)
    values -= np.multiply(np.floor(turns, out=turns), period, out=turns)
    # A quotient just below a whole number may have been rounded up to it.
    return np.add(values, period, out=values, where=values < 0)


def hexagonal_points(rng: np.random.Generator, height: int, width: int, spacing: float, jitter: float) -> FloatArray:
    """Draw (M, 2) positions about ``spacing`` apart that cover the area, each moved by up to ``jitter`` · spacing.

    The lattice has a random angle: if it were aligned with the token grid, tokens would differ by their position.
    """
    extent = np.hypot(height, width) / 2 + 2 * spacing
    steps = np.arange(-extent, extent, spacing)
    x, y = np.meshgrid(steps, steps * 0.866)
    x[::2] += spacing / 2
    points = np.stack([x, y], -1).reshape(-1, 2) + rng.uniform(0, spacing, 2)
    points = points @ rotation(rng.uniform(0, np.pi)) + (width / 2, height / 2)
    points += rng.uniform(-jitter * spacing, jitter * spacing, points.shape)
    inside = (points >= 0).all(1) & (points < (width, height)).all(1)
    return points[inside].astype(np.float32)


def paint_nuclei(
    layer: ByteArray,
    points: FloatArray,
    half_axes: FloatArray,
    angles: NDArray[np.floating],
    darkness: NDArray[np.floating],
) -> None:
    """Paint M elliptical nuclei: (M, 2) centres, (M, 2) half axes, (M,) angles in radians, (M,) densities 0 to 255."""
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    local = circle[None] * half_axes[:, None]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    outlines = np.stack([local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos], -1)
    fixed = np.rint((outlines + points[:, None]) * 2**SUBPIXEL_BITS).astype(np.int32)
    for outline, value in zip(fixed, np.clip(darkness, 0, 255).tolist(), strict=True):
        cv2.fillConvexPoly(layer, outline, value, shift=SUBPIXEL_BITS)


def paint_gland(rng: np.random.Generator, canvas: Canvas, centre: FloatArray, radius: float, kind: Gland) -> None:
    """Paint one gland: epithelium, lumen, rings of nuclei."""
    outline = blob(rng, radius, elongation=rng.uniform(1.0, 1.5), roughness=kind.waviness) + centre
    share = rng.uniform(*kind.lumen)
    ripple = 1 + 0.10 * np.sin(np.arange(96) * rng.integers(4, 11) * 2 * np.pi / 96 + rng.uniform(0, 6))
    lumen = centre + (outline - centre) * (share * ripple)[:, None]
    fill(canvas.nuclei, outline, 0)
    fill(canvas.haematoxylin, outline, kind.cytoplasm[0] + int(rng.integers(-8, 9)))
    fill(canvas.eosin, outline, kind.cytoplasm[1] + int(rng.integers(-14, 15)))
    secretion = int(rng.integers(20, 60)) if rng.random() < 0.25 else 0
    fill(canvas.haematoxylin, lumen, 0)
    fill(canvas.eosin, lumen, secretion)
    for row in kind.rows:
        paint_ring(rng, canvas.nuclei, outline, lumen, row, kind)


def paint_ring(
    rng: np.random.Generator, layer: ByteArray, outline: Points, lumen: Points, row: float, kind: Gland
) -> None:
    """Paint nuclei along the line at position ``row`` between the outline (0) and the lumen (1)."""
    inset = min(0.9, (kind.nucleus[0] + 1.0) / max(8.0, float(np.linalg.norm(outline - lumen, axis=1).mean())))
    line = outline + (lumen - outline) * (inset + row * (1 - 2 * inset))
    step = np.roll(line, -1, 0) - line
    travelled = np.concatenate([[0.0], np.cumsum(np.linalg.norm(step, axis=1))])
    count = max(5, int(travelled[-1] / kind.nucleus_spacing))
    stop = (np.arange(count) + rng.uniform(-0.5, 0.5, count) * kind.irregularity) * travelled[-1] / count
    stop = np.mod(stop, travelled[-1])
    closed = np.concatenate([line, line[:1]])
    points = np.stack([np.interp(stop, travelled, closed[:, axis]) for axis in (0, 1)], 1)
    points += rng.normal(0, 1.2 * kind.irregularity, points.shape)
    inward = points - line.mean(0)
    size = np.exp(rng.normal(0, 0.35 * kind.irregularity, (count, 1))) * np.array(kind.nucleus)
    darkness = rng.uniform(*kind.darkness, count)
    angle = np.arctan2(inward[:, 1], inward[:, 0]) + rng.normal(0, 0.5 * kind.irregularity, count)
    paint_nuclei(layer, points.astype(np.float32), size.astype(np.float32), angle, darkness)


def stain(
    haematoxylin: ByteArray, eosin: ByteArray, tint: NDArray[np.floating], strength: tuple[float, float]
) -> ByteArray:
    """Turn stain densities into (H, W, 3) uint8 RGB on white glass.

    Args:
        haematoxylin: (H, W) density, 255 = the densest.
        eosin: (H, W) density, 255 = the densest.
        tint: (2, 3) small changes of the two stains' colours, added to their optical densities.
        strength: optical density of the densest haematoxylin and eosin.
    """
    level = np.arange(256)[:, None] / 255
    image = cv2.merge([haematoxylin] * 3)
    rgb = cv2.LUT(image, transmission(level * strength[0] * (HAEMATOXYLIN_OD + tint[0])))
    pink = cv2.LUT(cv2.merge([eosin] * 3), transmission(level * strength[1] * (EOSIN_OD + tint[1])))
    return cv2.multiply(rgb, pink, rgb, scale=1 / 255)


def transmission(density: NDArray[np.floating]) -> ByteArray:
    """Convert (256, 3) optical densities to a (1, 256, 3) table of the transmitted light, 255 = all of it."""
    return np.rint(255 * np.exp(-np.maximum(density, 0) * np.log(10) * 0.5)).astype(np.uint8)[None]
