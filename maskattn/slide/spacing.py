"""The spacing of a slide: µm per level-0 pixel, from whoever knows it best.

Order: the caller's override or the manifest's column, then the file's own words (OME-XML's, OpenSlide's, the tags of
TIFF), then an error that says how to give it. Metadata is often missing and sometimes absurd (264.6 µm from a 96 dpi
tag), so what is implausible is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from maskattn.errors import SlideError

__all__ = ["MAX_SPACING_UM", "MIN_SPACING_UM", "SlideSpacing", "parse_number", "resolve_spacing"]

MIN_SPACING_UM = 0.05
MAX_SPACING_UM = 20.0
_MAX_ANISOTROPY = 1.05
_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}
_HOW = "or the manifest's spacing_um column (µm per level-0 pixel)"
_REMEDY = f"give the spacing with `--spacing-um 0.5` {_HOW}"
_IF_WRONG = f"if that is wrong, give the slide's own spacing with `--spacing-um` {_HOW}"
# Resolutions of screens and printers, which writers of TIFF put where they know none.
_DOTS_PER_INCH = (1, 72, 75, 90, 96, 100, 120, 144, 150, 200, 240, 300, 360, 400, 600, 720, 1200)


@dataclass(frozen=True)
class SlideSpacing:
    """µm per level-0 pixel and where it came from: "override", "manifest" or "metadata"."""

    spacing_um: float
    source: str


def resolve_spacing(
    path: Path,
    properties: Mapping[str, str],
    given_um: float | None = None,
    given_by: str = "override",
    size_px: tuple[int, int] | None = None,
) -> SlideSpacing:
    """Settle a slide's spacing.

    Args:
        path: the slide, for messages.
        properties: the reader's properties of the slide.
        given_um: the caller's own value; authoritative.
        given_by: who gave it: "override" or "manifest".
        size_px: (width, height) of level 0, for messages.

    Raises:
        SlideError: no value is given or found, it lies outside 0.05-20 µm, or x and y differ by more than 5 %.
    """
    if given_um is not None:
        if not _plausible(given_um):
            raise SlideError(
                f"{_rule()}, got {given_um:g} from the {given_by} for '{path}'; give µm per level-0 pixel, which is "
                "about 0.25 for a scan at 40×, 0.5 at 20× and 1 at 10×"
            )
        return SlideSpacing(float(given_um), given_by)
    refused: dict[str, tuple[float, float]] = {}
    for name, (x_um, y_um) in {
        "PhysicalSizeX/Y": _pair(properties, "ome.mpp-x", "ome.mpp-y"),
        "openslide.mpp-x/y": _pair(properties, "openslide.mpp-x", "openslide.mpp-y"),
        "tiff.XResolution/YResolution": _from_tiff(properties),
    }.items():
        if x_um is None or y_um is None:
            continue
        if not (_plausible(x_um) and _plausible(y_um)):
            refused[name] = (x_um, y_um)
        elif max(x_um, y_um) > _MAX_ANISOTROPY * min(x_um, y_um):
            raise SlideError(
                f"a slide's spacing must be the same in x and y within 5 %, got {name} = {x_um:g}, {y_um:g} µm in "
                f"'{path}'; resample the slide to square pixels, or {_IF_WRONG}"
            )
        else:
            return SlideSpacing((x_um + y_um) / 2, "metadata")
    if not refused:
        raise SlideError(f"{_rule()}, got none in the metadata of '{path}'; {_REMEDY}")
    said = " and ".join(f"{name} = {x_um:g}, {y_um:g}" for name, (x_um, y_um) in refused.items())
    x_um, y_um = next(iter(refused.values()))
    raise SlideError(f"{_rule()}, got only {said} (µm) in the metadata of '{path}'; {_remedy(x_um, y_um, size_px)}")


def _remedy(x_um: float, y_um: float, size_px: tuple[int, int] | None) -> str:
    """The remedy for a spacing out of range, depending on the value."""
    dots = 25_400 / x_um if x_um > 0 and math.isfinite(x_um) else 0.0
    if any(abs(dots - common) < 0.002 * common for common in _DOTS_PER_INCH):
        return f"{dots:.0f} dots per inch are a screen's or a printer's resolution, not the slide's: {_REMEDY}"
    if min(x_um, y_um) > MAX_SPACING_UM:
        size = "" if size_px is None else f" of {size_px[0]} × {size_px[1]} px"
        return f"this is an overview{size}: name the file of the full-resolution level, or {_IF_WRONG}"
    return _IF_WRONG


def _rule() -> str:
    return f"a slide needs a spacing of {MIN_SPACING_UM:g} to {MAX_SPACING_UM:g} µm per pixel"


def _plausible(spacing_um: float) -> bool:
    return math.isfinite(spacing_um) and MIN_SPACING_UM <= spacing_um <= MAX_SPACING_UM


def _pair(properties: Mapping[str, str], name_x: str, name_y: str) -> tuple[float | None, float | None]:
    """Two numbers of the properties; one stands for both where the other is missing."""
    x_um, y_um = parse_number(properties.get(name_x)), parse_number(properties.get(name_y))
    return (y_um if x_um is None else x_um), (x_um if y_um is None else y_um)


def _from_tiff(properties: Mapping[str, str]) -> tuple[float | None, float | None]:
    unit_um = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = parse_number(properties.get("tiff.XResolution")), parse_number(properties.get("tiff.YResolution"))
    if unit_um is None or not x or not y:
        return None, None
    return unit_um / x, unit_um / y


def parse_number(text: str | None) -> float | None:
    """The number that a property's text holds, or None."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
