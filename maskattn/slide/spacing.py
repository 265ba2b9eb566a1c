"""The spacing of a slide: µm per level-0 pixel, from whoever knows it best.

Order: the caller's override or the manifest's column, then the file's own words, then an error that says how to give
it. Metadata is often missing and sometimes absurd (264.6 µm from a 96 dpi tag), so what is implausible is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from maskattn.errors import SlideError

__all__ = ["SlideSpacing", "parse_number", "resolve_spacing"]

MIN_SPACING_UM = 0.05
MAX_SPACING_UM = 20.0
_MAX_ANISOTROPY = 1.05
_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}
_REMEDY = "give the spacing with `--spacing-um 0.5` or the manifest's spacing_um column (µm per level-0 pixel)"


@dataclass(frozen=True)
class SlideSpacing:
    """µm per level-0 pixel and where it came from: "override", "manifest" or "metadata"."""

    spacing_um: float
    source: str


def resolve_spacing(
    path: Path, properties: Mapping[str, str], given_um: float | None = None, given_by: str = "override"
) -> SlideSpacing:
    """Settle a slide's spacing.

    Args:
        path: the slide, for messages.
        properties: OpenSlide's properties of the slide.
        given_um: the caller's own value; authoritative.
        given_by: who gave it: "override" or "manifest".

    Raises:
        SlideError: no value is given or found, it lies outside 0.05-20 µm, or x and y differ by more than 5 %.
    """
    if given_um is not None:
        if not _plausible(given_um):
            raise SlideError(f"{_rule()}, got {given_um:g} from the {given_by} for '{path}'; {_REMEDY}")
        return SlideSpacing(float(given_um), given_by)
    refused = []
    for name, (x_um, y_um) in {
        "openslide.mpp-x/y": _from_openslide(properties),
        "tiff.XResolution/YResolution": _from_tiff(properties),
    }.items():
        if x_um is None or y_um is None:
            continue
        if not (_plausible(x_um) and _plausible(y_um)):
            refused.append(f"{name} = {x_um:g}, {y_um:g}")
        elif max(x_um, y_um) > _MAX_ANISOTROPY * min(x_um, y_um):
            raise SlideError(
                f"a slide's spacing must be the same in x and y within 5 %, got {name} = {x_um:g}, {y_um:g} µm in "
                f"'{path}'; {_REMEDY}"
            )
        else:
            return SlideSpacing((x_um + y_um) / 2, "metadata")
    said = f"only {' and '.join(refused)} (µm)" if refused else "none"
    raise SlideError(f"{_rule()}, got {said} in the metadata of '{path}'; {_REMEDY}")


def _rule() -> str:
    return f"a slide needs a spacing of {MIN_SPACING_UM:g} to {MAX_SPACING_UM:g} µm per pixel"


def _plausible(spacing_um: float) -> bool:
    return math.isfinite(spacing_um) and MIN_SPACING_UM <= spacing_um <= MAX_SPACING_UM


def _from_openslide(properties: Mapping[str, str]) -> tuple[float | None, float | None]:
    x_um, y_um = parse_number(properties.get("openslide.mpp-x")), parse_number(properties.get("openslide.mpp-y"))
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
