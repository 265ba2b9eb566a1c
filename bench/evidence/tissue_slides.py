"""Drawn slides with known tissue, for ``bench/evidence/tissue.py``: stains, glass and marks of many kinds.

Tissue has the stroma, glands and nuclei of the synthetic slides (``maskattn.demo.synthetic``), drawn at 1 µm and used
at 2 µm per pixel. Stains follow the Beer–Lambert law. Glass may be tinted, unevenly lit or littered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from maskattn.demo.synthetic import draw_tissue, make_slide, paint_benign, paint_stroma
from maskattn.demo.textures import smooth_noise

__all__ = ["DrawnSlide", "drawn_slides", "glas_composites", "synthetic_slides"]

DRAWN_PX, SPACING_UM = 2048, 2.0
SIZE_PX = DRAWN_PX // 2

# Optical density of one unit of stain in red, green and blue. Sources: Ruifrok and Johnston 2001 (H, E, DAB), and the
# vectors that ImageJ's colour deconvolution lists (aniline blue, azocarmine, PAS, fast red, methyl green).
HAEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.07, 0.99, 0.11)
DAB = (0.27, 0.57, 0.78)
FAST_RED = (0.21, 0.85, 0.48)
ANILINE_BLUE = (0.85, 0.51, 0.11)
AZOCARMINE = (0.10, 0.74, 0.67)
LIGHT_GREEN = (0.92, 0.26, 0.28)
PAS = (0.18, 0.97, 0.15)
GIEMSA_BLUE = (0.83, 0.51, 0.21)
GIEMSA_PINK = (0.09, 0.95, 0.28)
SILVER = (0.57, 0.58, 0.59)
SAFFRON = (0.05, 0.35, 0.94)
CONGO_RED = (0.10, 0.82, 0.56)


@dataclass(frozen=True)
class DrawnSlide:
    """A slide and its ground truth.

    Attributes:
        name: the kind of slide.
        image_HW3: (H, W, 3) uint8 RGB.
        tissue_HW: (H, W) bool, the tissue, lumens included.
        spacing_um: µm per pixel.
        open_HW: (H, W) bool, pixels where either answer is right; None if there are none.
    """

    name: str
    image_HW3: np.ndarray
    tissue_HW: np.ndarray
    spacing_um: float = SPACING_UM
    open_HW: np.ndarray | None = None


@dataclass(frozen=True)
class Stain:
    """The optical density of nuclei and matrix in a stain, at its darkest.

    ``patch`` replaces the matrix's stain in patches that cover about ``share`` of the tissue.
    """

    nuclei: tuple[float, ...]
    matrix: tuple[float, ...]
    patch: tuple[float, ...] | None = None
    share: float = 0.5


def mixed(*pairs: tuple[tuple[float, ...], float]) -> tuple[float, ...]:
    return tuple(sum(vector[c] * amount for vector, amount in pairs) for c in range(3))


STAINS = {
    "H&E": Stain(mixed((HAEMATOXYLIN, 1.2)), mixed((EOSIN, 0.8))),
    "H&E, pale": Stain(mixed((HAEMATOXYLIN, 0.35)), mixed((EOSIN, 0.16))),
    "H&E, faded": Stain(mixed((HAEMATOXYLIN, 0.15)), mixed((EOSIN, 0.10))),
    "IHC, DAB in one half": Stain(
        mixed((HAEMATOXYLIN, 0.5)), mixed((HAEMATOXYLIN, 0.16)), mixed((DAB, 1.0), (HAEMATOXYLIN, 0.1))
    ),
    "IHC, pale, DAB in a tenth": Stain(
        mixed((HAEMATOXYLIN, 0.4)), mixed((HAEMATOXYLIN, 0.10)), mixed((DAB, 1.0)), share=0.1
    ),
    "IHC, red chromogen": Stain(mixed((HAEMATOXYLIN, 0.4)), mixed((HAEMATOXYLIN, 0.12)), mixed((FAST_RED, 0.9))),
    "Trichrome, blue": Stain(mixed((HAEMATOXYLIN, 1.2)), mixed((AZOCARMINE, 0.8)), mixed((ANILINE_BLUE, 0.9))),
    "Trichrome, green": Stain(mixed((HAEMATOXYLIN, 1.2)), mixed((AZOCARMINE, 0.8)), mixed((LIGHT_GREEN, 0.8))),
    "Trichrome, mostly blue": Stain(
        mixed((HAEMATOXYLIN, 1.0)), mixed((ANILINE_BLUE, 1.0)), mixed((AZOCARMINE, 0.8)), share=0.15
    ),
    "PAS": Stain(mixed((HAEMATOXYLIN, 0.9)), mixed((PAS, 0.4)), mixed((PAS, 1.2)), share=0.3),
    "Silver, reticulin": Stain(mixed((SILVER, 1.5)), mixed((SILVER, 0.25)), mixed((SILVER, 0.8)), share=0.2),
    "Silver on green (GMS)": Stain(mixed((SILVER, 1.5)), mixed((LIGHT_GREEN, 0.5))),
    "Giemsa": Stain(mixed((GIEMSA_BLUE, 1.3)), mixed((GIEMSA_BLUE, 0.3)), mixed((GIEMSA_PINK, 0.4))),
    "Congo red": Stain(mixed((HAEMATOXYLIN, 0.6)), mixed((CONGO_RED, 0.12)), mixed((CONGO_RED, 0.6)), share=0.2),
    "Saffron trichrome": Stain(mixed((HAEMATOXYLIN, 1.0)), mixed((EOSIN, 0.5)), mixed((SAFFRON, 0.6))),
    "Haematoxylin alone": Stain(mixed((HAEMATOXYLIN, 0.8)), mixed((HAEMATOXYLIN, 0.12))),
}

PENS = {
    "black": (30, 30, 34),
    "blue": (30, 60, 170),
    "green": (25, 120, 70),
    "red": (200, 30, 45),
    "purple": (90, 40, 150),
    "turquoise": (20, 140, 170),
}


@lru_cache(maxsize=4)
def anatomy(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw tissue (bool), nuclei, matrix (0 to 1) and a smooth field that divides it into patches; all (H, W)."""
    rng = np.random.default_rng(seed)
    tissue = draw_tissue(rng, DRAWN_PX)
    canvas = paint_stroma(rng, tissue)
    paint_benign(rng, canvas, tissue, np.zeros_like(tissue))
    edge = cv2.GaussianBlur(tissue, (0, 0), 1.5).astype(np.float32) / 255
    nuclei = cv2.GaussianBlur(cv2.add(canvas.nuclei, canvas.haematoxylin), (0, 0), 0.8).astype(np.float32) / 255
    matrix = cv2.GaussianBlur(canvas.eosin, (0, 0), 1.0).astype(np.float32) / 130
    patches = smooth_noise(rng, DRAWN_PX, DRAWN_PX, 300)
    halves = (
        cv2.resize(plane, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA)
        for plane in (tissue, nuclei * edge, matrix * edge, patches)
    )
    half_tissue, half_nuclei, half_matrix, half_patches = halves
    return half_tissue > 127, half_nuclei, half_matrix, half_patches


def dyed(seed: int, stain: Stain) -> tuple[np.ndarray, np.ndarray]:
    """Return the optical density (H, W, 3) of stained tissue, and the tissue (H, W)."""
    tissue, nuclei, matrix, field_HW = anatomy(seed)
    density = nuclei[..., None] * np.array(stain.nuclei, np.float32)
    kinds = np.broadcast_to(np.array(stain.matrix, np.float32), density.shape)
    if stain.patch is not None:
        border = np.quantile(field_HW[tissue], 1 - stain.share)
        patch = 1 / (1 + np.exp(-np.clip((field_HW - border) / 0.02, -30, 30)))
        kinds = kinds + patch[..., None] * (np.array(stain.patch, np.float32) - kinds)
    return (density + matrix[..., None] * kinds).astype(np.float32), tissue


@dataclass
class Plate:
    """A slide while it is being drawn: its optical density, and the light that passes through it."""

    density: np.ndarray
    tissue: np.ndarray
    rng: np.random.Generator
    light: np.ndarray = field(default_factory=lambda: np.array((246.0, 245.0, 246.0), np.float32))
    noise: float = 3.0
    focus_px: float = 0.0
    open_HW: np.ndarray | None = None

    def develop(self, name: str) -> DrawnSlide:
        image = self.light * np.exp(-np.float32(np.log(10)) * self.density)
        if self.focus_px:
            image = cv2.GaussianBlur(image, (0, 0), self.focus_px)
        image += self.rng.normal(0, self.noise, (*self.tissue.shape, 1)).astype(np.float32)
        image += self.rng.normal(0, self.noise / 2, image.shape).astype(np.float32)
        return DrawnSlide(name, np.clip(image, 0, 255).astype(np.uint8), self.tissue, open_HW=self.open_HW)


def plate(seed: int, stain: str | None = "H&E") -> Plate:
    rng = np.random.default_rng((seed, 7))
    if stain is None:
        return Plate(np.zeros((SIZE_PX, SIZE_PX, 3), np.float32), np.zeros((SIZE_PX, SIZE_PX), bool), rng)
    density, tissue = dyed(seed, STAINS[stain])
    return Plate(density, tissue, rng)


def stroke(rng: np.random.Generator, width_px: int) -> np.ndarray:
    """Draw one curved pen stroke at a random position, (H, W) bool."""
    t = np.linspace(-1, 1, 60)
    length, bend, angle = rng.uniform(0.3, 0.5) * SIZE_PX, rng.uniform(-0.25, 0.25) * SIZE_PX, rng.uniform(0, np.pi)
    x, y = t * length, bend * (t**2 - 0.5)
    centre = rng.uniform(0.3, 0.7, 2) * SIZE_PX
    points = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], 1) + centre
    cover = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    cv2.polylines(cover, [np.rint(points).astype(np.int32)], False, 255, width_px)
    return cover > 0


def ink(drawn: Plate, pen: str, *, across: bool, width_um: float = 120.0) -> Plate:
    """Draw a pen stroke on glass only, or across the tissue, where either answer is right."""
    away = cv2.dilate(drawn.tissue.astype(np.uint8), np.ones((31, 31), np.uint8)) > 0
    best, best_fit = None, -1.0
    for _ in range(60):
        cover = stroke(drawn.rng, round(width_um / SPACING_UM))
        on_tissue = float(cover[drawn.tissue if across else away].sum() / cover.sum())
        fit = 1 - abs(on_tissue - 0.4) if across else 1 - on_tissue
        if fit > best_fit:
            best, best_fit = cover, fit
    assert best is not None
    if not across:
        best &= ~away
    soft = cv2.GaussianBlur(best.astype(np.float32), (0, 0), 2)
    streaks = 1 + 0.05 * smooth_noise(drawn.rng, SIZE_PX, SIZE_PX, 20)
    density = -np.log10((np.array(PENS[pen], np.float32) + 1) / 250)
    drawn.density = drawn.density + (soft * streaks)[..., None] * density
    drawn.open_HW = (cv2.dilate((soft > 0.02).astype(np.uint8), np.ones((25, 25), np.uint8)) > 0) & drawn.tissue
    return drawn


def tinted(drawn: Plate, light: tuple[float, float, float]) -> Plate:
    drawn.light = np.array(light, np.float32)
    return drawn


def uneven(drawn: Plate, fall: float, *, radial: bool) -> Plate:
    """Let the light fall off by a share, from left to right or from the centre to the corners."""
    y, x = np.mgrid[-1 : 1 : SIZE_PX * 1j, -1 : 1 : SIZE_PX * 1j].astype(np.float32)
    share = (x**2 + y**2) / 2 if radial else (x + 1) / 2
    drawn.light = drawn.light * (1 - fall * share)[..., None]
    return drawn


def bleeding(drawn: Plate) -> Plate:
    """Add eosin that has run out of the tissue and fades over the glass."""
    run = cv2.GaussianBlur(drawn.tissue.astype(np.float32), (0, 0), 110)
    drawn.density = drawn.density + (run / run.max() * 0.10)[..., None] * np.array(EOSIN, np.float32)
    return drawn


def littered(drawn: Plate) -> Plate:
    """Add dust, coverslip edges, an air bubble's rim, a blurred shadow and an array's dots, on glass and tissue."""
    rng, layer = drawn.rng, np.zeros((SIZE_PX, SIZE_PX), np.float32)
    for _ in range(150):
        centre = tuple(rng.integers(0, SIZE_PX, 2).tolist())
        cv2.circle(layer, centre, int(rng.integers(1, 9)), float(rng.uniform(0.1, 0.6)), -1)
    for heading in (0.02, np.pi / 2 + 0.03):
        middle = rng.uniform(0.1, 0.9, 2) * SIZE_PX
        offset = 2 * SIZE_PX * np.array([np.cos(heading), np.sin(heading)])
        ends = [np.rint(middle + sign * offset).astype(int).tolist() for sign in (-1, 1)]
        cv2.line(layer, *ends, 0.3, int(rng.integers(3, 10)), cv2.LINE_AA)
    cv2.circle(layer, tuple(rng.integers(150, SIZE_PX - 150, 2).tolist()), 110, 0.35, 7, cv2.LINE_AA)
    shadow = np.zeros_like(layer)
    cv2.circle(shadow, tuple(rng.integers(0, SIZE_PX, 2).tolist()), 80, 0.15, -1)
    layer = cv2.GaussianBlur(layer, (0, 0), 1.0) + cv2.GaussianBlur(shadow, (0, 0), 30)
    for y in range(50, SIZE_PX, 100):
        for x in range(50, SIZE_PX, 100):
            cv2.circle(layer, (x, y), 25, 0.02, -1)
    drawn.density = drawn.density + layer[..., None]
    return drawn


def blurred(drawn: Plate, sigma_px: float) -> Plate:
    drawn.focus_px = sigma_px
    return drawn


def filled(seed: int, stain: str) -> Plate:
    """Draw a slide that is all tissue: the inside of a piece, continued by mirroring."""
    drawn = plate(seed, stain)
    depth = cv2.distanceTransform(drawn.tissue.astype(np.uint8), cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    half = int(depth.max() / 2**0.5) - 2
    inside = drawn.density[y - half : y + half, x - half : x + half]
    pad = SIZE_PX - 2 * half
    borders = (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2)
    drawn.density = cv2.copyMakeBorder(inside, *borders, cv2.BORDER_REFLECT)
    drawn.tissue = np.ones_like(drawn.tissue)
    return drawn


def drawn_slides(seed: int) -> dict[str, Callable[[], DrawnSlide]]:
    """Return functions that draw the slides of one seed, by name; the same seed draws the same slides."""
    plates: dict[str, Callable[[], Plate]] = {}
    for stain in STAINS:
        plates[stain] = lambda stain=stain: plate(seed, stain)
    for pen in PENS:
        plates[f"H&E, {pen} pen on glass"] = lambda pen=pen: ink(plate(seed), pen, across=False)
        plates[f"H&E, {pen} pen across"] = lambda pen=pen: ink(plate(seed), pen, across=True)
        plates[f"glass, {pen} pen"] = lambda pen=pen: ink(plate(seed, None), pen, across=False)
    for pen in ("blue", "green"):
        plates[f"Trichrome, {pen}; {pen} pen on glass"] = lambda pen=pen: ink(
            plate(seed, f"Trichrome, {pen}"), pen, across=False
        )
    plates |= {
        "H&E, thin blue pen": lambda: ink(plate(seed), "blue", across=False, width_um=40),
        "H&E, warm glass": lambda: tinted(plate(seed), (250, 240, 218)),
        "H&E, green glass": lambda: tinted(plate(seed), (225, 245, 228)),
        "H&E, grey glass": lambda: tinted(plate(seed), (205, 205, 205)),
        "H&E, pale, warm glass": lambda: tinted(plate(seed, "H&E, pale"), (250, 240, 218)),
        "H&E, light falls off sideways": lambda: uneven(plate(seed), 0.25, radial=False),
        "H&E, pale, vignette": lambda: uneven(plate(seed, "H&E, pale"), 0.25, radial=True),
        "IHC, vignette": lambda: uneven(plate(seed, "IHC, DAB in one half"), 0.25, radial=True),
        "H&E, eosin ran out": lambda: bleeding(plate(seed)),
        "H&E, litter on the glass": lambda: littered(plate(seed)),
        "IHC, litter on the glass": lambda: littered(plate(seed, "IHC, DAB in one half")),
        "H&E, out of focus": lambda: blurred(plate(seed), 7.5),
        "glass": lambda: plate(seed, None),
        "glass, warm, vignette": lambda: uneven(tinted(plate(seed, None), (250, 240, 218)), 0.25, radial=True),
        "glass, green": lambda: tinted(plate(seed, None), (225, 245, 228)),
        "glass, litter": lambda: littered(plate(seed, None)),
        "all tissue, H&E": lambda: filled(seed, "H&E"),
        "all tissue, IHC": lambda: filled(seed, "IHC, DAB in one half"),
        "all tissue, trichrome": lambda: filled(seed, "Trichrome, blue"),
    }
    return {name: lambda name=name, draw=draw: draw().develop(name) for name, draw in plates.items()}


def synthetic_slides(count: int, first_seed: int) -> list[Callable[[], DrawnSlide]]:
    """Return functions that draw the demonstration's slides, with their dust, coverslip edges and pen marks."""

    def draw(seed: int) -> DrawnSlide:
        slide = make_slide(seed)
        return DrawnSlide("synthetic (demonstration)", slide.image_HW3, slide.tissue_HW, slide.spacing_um)

    return [lambda seed=first_seed + index: draw(seed) for index in range(count)]


def glas_composites(folder: Path, count: int) -> list[Callable[[], DrawnSlide]]:
    """Return functions that paste elliptical pieces of real H&E tissue onto drawn glass, at 1.24 µm per pixel.

    Either answer is right where the picture itself shows bare glass in a lumen.
    """
    paths = sorted(path for path in folder.glob("*.jpg"))

    def draw(index: int) -> DrawnSlide:
        rng = np.random.default_rng((index, 11))
        height, width = 1100, 1500
        glass = np.array((244, 242, 243), np.float32) + rng.normal(0, 2.0, (height, width, 3)).astype(np.float32)
        tissue, lumen = np.zeros((height, width), bool), np.zeros((height, width), bool)
        for slot in range(6):
            picture = cv2.cvtColor(cv2.imread(str(paths[int(rng.integers(len(paths)))])), cv2.COLOR_BGR2RGB)
            rows, cols = picture.shape[:2]
            y, x = 60 + 520 * (slot // 3), 40 + 490 * (slot % 3)
            shape = np.zeros((rows, cols), np.uint8)
            cv2.ellipse(shape, (cols // 2, rows // 2), (cols // 2 - 12, rows // 2 - 12), 0, 0, 360, 255, -1)
            cover = cv2.GaussianBlur(shape, (0, 0), 2).astype(np.float32)[..., None] / 255
            window = (slice(y, y + rows), slice(x, x + cols))
            glass[window] += cover * (picture - glass[window])
            tissue[window] |= shape > 0
            lumen[window] |= (shape > 0) & (cv2.GaussianBlur(picture, (0, 0), 2).min(axis=2) > 205)
        wide = cv2.dilate(lumen.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        return DrawnSlide("GlaS on glass", np.clip(glass, 0, 255).astype(np.uint8), tissue, 1.24, wide & tissue)

    return [lambda index=index: draw(index) for index in range(count)]
