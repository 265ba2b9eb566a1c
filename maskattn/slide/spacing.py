"""The spacing of a slide, µm per level-0 pixel, from the most reliable source.

The caller's override or the manifest's column comes first, then the file's metadata (OME-XML, OpenSlide, TIFF tags),
then an error that says how to give the spacing. Metadata are often missing and sometimes absurd (264.6 µm from a 96 dpi
tag), so implausible values are refused.
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
# Resolutions of screens and printers, which TIFF writers store if they know no other.
_DOTS_PER_INCH = (1, 72, 75, 90, 96, 100, 120, 144, 150, 200, 240, 300, 360, 400, 600, 720, 1200)


@dataclass(frozen=True)
class SlideSpacing:
    """µm per level-0 pixel and its source: "override", "manifest" or "metadata"."""

    spacing_um: float
    source: str


def resolve_spacing(
    path: Path,
    properties: Mapping[str, str],
    given_um: float | None = None,
    given_by: str = "override",
    size_px: tuple[int, int] | None = None,
) -> SlideSpacing:
    """Determine a slide's spacing.

    Args:
        path: the slide, for messages.
        properties: the reader's properties of the slide.
        given_um: the spacing that the caller gives, which overrides the metadata; None if not given.
        given_by: the source of ``given_um``: "override" or "manifest".
        size_px: (width, height) of level 0, for messages.

    Raises:
        SlideError: no spacing is given or found, it is outside 0.05-20 µm, or x and y differ by more than 5 %.
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
    stated = " and ".join(f"{name} = {x_um:g}, {y_um:g}" for name, (x_um, y_um) in refused.items())
    x_um, y_um = next(iter(refused.values()))
    raise SlideError(f"{_rule()}, got only {stated} (µm) in the metadata of '{path}'; {_remedy(x_um, y_um, size_px)}")


def _remedy(x_um: float, y_um: float, size_px: tuple[int, int] | None) -> str:
    """Return the remedy for a spacing out of range, depending on the value."""
    dots = 25_400 / x_um if x_um > 0 and math.isfinite(x_um) else 0.0
    if any(abs(dots - common) < 0.002 * common for common in _DOTS_PER_INCH):
        return f"{dots:.0f} dots per inch is a screen's or a printer's resolution, not the slide's: {_REMEDY}"
    if min(x_um, y_um) > MAX_SPACING_UM:
        size = "" if size_px is None else f" of {size_px[0]} × {size_px[1]} px"
        return f"this is an overview{size}: give the file of the full-resolution level, or {_IF_WRONG}"
    return _IF_WRONG


def _rule() -> str:
    return f"a slide needs a spacing of {MIN_SPACING_UM:g} to {MAX_SPACING_UM:g} µm per pixel"


def _plausible(spacing_um: float) -> bool:
    return math.isfinite(spacing_um) and MIN_SPACING_UM <= spacing_um <= MAX_SPACING_UM


def _pair(properties: Mapping[str, str], name_x: str, name_y: str) -> tuple[float | None, float | None]:
    """Return two numbers of the properties; if one is missing, the other is used for both."""
    x_um, y_um = parse_number(properties.get(name_x)), parse_number(properties.get(name_y))
    return (y_um if x_um is None else x_um), (x_um if y_um is None else y_um)


def _from_tiff(properties: Mapping[str, str]) -> tuple[float | None, float | None]:
    unit_um = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = parse_number(properties.get("tiff.XResolution")), parse_number(properties.get("tiff.YResolution"))
    if unit_um is None or not x or not y:
        return None, None
    return unit_um / x, unit_um / y


def parse_number(text: str | None) -> float | None:
    """Return a property's text as a number, or None if it is not one."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
