"""Read the OME-XML in the first description of an OME-TIFF: its images, their spacing and their channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.etree import ElementTree

__all__ = ["OmeImage", "ome_properties", "read_ome"]

# µm per unit; "pixel" and "reference frame" are not lengths.
_UM_PER_UNIT = {
    "pm": 1e-6,
    "Å": 1e-4,
    "nm": 1e-3,
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "thou": 25.4,
    "mil": 25.4,
    "in": 25_400.0,
    "inch": 25_400.0,
    "ft": 304_800.0,
}
_PURE_COLOURS = {0xFF0000: "red", 0x00FF00: "green", 0x0000FF: "blue"}


@dataclass(frozen=True)
class OmeImage:
    """An image element of OME-XML.

    Attributes:
        name: the image's name, or "".
        spacing_um: µm per pixel along x and y; None if they are not given as lengths.
        objective_power: nominal magnification of the objective; None if it is not given.
        channels: each channel's name, else its colour if that is pure red, green or blue, else "".
        fluorescence: whether any channel is declared as fluorescence.
        significant_bits: bits of each sample that are used; None if it is not given.
    """

    name: str
    spacing_um: tuple[float, float] | None
    objective_power: float | None
    channels: tuple[str, ...]
    fluorescence: bool
    significant_bits: int | None


def read_ome(description: str | None) -> tuple[OmeImage, ...]:
    """Return the images of an OME-XML text in order; none if the text is not OME-XML or is malformed."""
    if not description or "<OME" not in description[:4096] or "<!ENTITY" in description:
        return ()
    try:
        root = ElementTree.fromstring(description.strip().rstrip("\0").encode("utf-8"))
    except (ElementTree.ParseError, ValueError):
        return ()
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    powers = {
        objective.get("ID"): _number(objective.get("NominalMagnification")) for objective in root.iter("Objective")
    }
    return tuple(_image(element, powers) for element in root.iter("Image") if element.find("Pixels") is not None)


def ome_properties(description: str | None, series: int = 0) -> dict[str, str]:
    """Return the spacing and magnification of an image: ``ome.mpp-x``, ``ome.mpp-y`` and ``ome.objective-power``."""
    images = read_ome(description)
    if series >= len(images):
        return {}
    image, properties = images[series], {}
    if image.spacing_um is not None:
        properties["ome.mpp-x"], properties["ome.mpp-y"] = (f"{um:.10g}" for um in image.spacing_um)
    if image.objective_power is not None:
        properties["ome.objective-power"] = f"{image.objective_power:g}"
    return properties


def _image(element: ElementTree.Element, powers: dict[str | None, float | None]) -> OmeImage:
    pixels = element.find("Pixels")
    assert pixels is not None
    settings = element.find("ObjectiveSettings")
    channels = pixels.findall("Channel")
    return OmeImage(
        name=element.get("Name", ""),
        spacing_um=_spacing(pixels),
        objective_power=None if settings is None else powers.get(settings.get("ID")),
        channels=tuple(_called(channel) for channel in channels),
        fluorescence=any(_fluoresces(channel) for channel in channels),
        significant_bits=_integer(pixels.get("SignificantBits")),
    )


def _spacing(pixels: ElementTree.Element) -> tuple[float, float] | None:
    x, y = (_length_um(pixels.get(f"PhysicalSize{a}"), pixels.get(f"PhysicalSize{a}Unit")) for a in "XY")
    x, y = (y if x is None else x), (x if y is None else y)
    return None if x is None or y is None else (x, y)


def _length_um(text: str | None, unit: str | None) -> float | None:
    value = _number(text)
    # Besides the standard's micro sign, files have the Greek letter mu, and the micro sign in a wrong code page.
    unit = "µm" if unit is None else unit.strip().replace("μ", "µ").replace("Âµ", "µ")
    factor = _UM_PER_UNIT.get(unit, _UM_PER_UNIT.get(unit.lower()))
    if value is None or factor is None or not value > 0:
        return None
    return value * factor


def _called(channel: ElementTree.Element) -> str:
    name = channel.get("Name", "")
    colour = _integer(channel.get("Color"))
    if name or colour is None:
        return name
    return _PURE_COLOURS.get((colour & 0xFFFFFFFF) >> 8, "")


def _fluoresces(channel: ElementTree.Element) -> bool:
    attributes = channel.attrib
    return (
        attributes.get("ContrastMethod", "").lower() == "fluorescence"
        or bool(attributes.get("Fluor"))
        or "EmissionWavelength" in attributes
    )


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _integer(text: str | None) -> int | None:
    value = _number(text)
    return None if value is None else int(value)
