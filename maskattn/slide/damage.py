"""Damage: the regions of a slide that cannot be decoded, the reasons, and the remedies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from maskattn.slide.formats.remedies import remedy_for

__all__ = ["Damage", "DamageLog", "Rectangle"]


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of pixels; ``right`` and ``bottom`` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """The number of pixels along x."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """The number of pixels along y."""
        return self.bottom - self.top

    def within(self, outer: Rectangle) -> tuple[slice, slice]:
        """Return the index of this rectangle's pixels in an array of the outer rectangle's pixels."""
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return rows, slice(self.left - outer.left, self.right - outer.left)

    def scaled(self, ratio_x: float, ratio_y: float) -> Rectangle:
        """Return the rectangle in pixels that are smaller by these ratios, rounded, and at least one pixel wide."""
        return Rectangle(
            round(self.left * ratio_x),
            round(self.top * ratio_y),
            max(round(self.right * ratio_x), round(self.left * ratio_x) + 1),
            max(round(self.bottom * ratio_y), round(self.top * ratio_y) + 1),
        )

    def halves(self, tile: tuple[int, int]) -> tuple[Rectangle, Rectangle] | None:
        """Cut it in two at an edge of tiles of that size, along the axis with more tiles; None within a single tile."""
        cut_x, columns = _middle(self.left, self.right, tile[0])
        cut_y, rows = _middle(self.top, self.bottom, tile[1])
        if columns <= 1 and rows <= 1:
            return None
        if columns >= rows:
            return (
                Rectangle(self.left, self.top, cut_x, self.bottom),
                Rectangle(cut_x, self.top, self.right, self.bottom),
            )
        return (
            Rectangle(self.left, self.top, self.right, cut_y),
            Rectangle(self.left, cut_y, self.right, self.bottom),
        )


def _middle(first: int, end: int, tile: int) -> tuple[int, int]:
    """Return the tile edge about midway between two positions, and the number of tiles that they span."""
    start, tiles = first // tile, -(-end // tile) - first // tile
    return (start + tiles // 2) * tile, tiles


@dataclass(frozen=True)
class Damage:
    """A region of a level that cannot be decoded.

    Attributes:
        level: the index of the level.
        region_lv0: the region in level-0 pixels.
        reason: the decoder's error message.
    """

    level: int
    region_lv0: Rectangle
    reason: str

    def message(self, path: Path) -> str:
        """Return the error message for a caller that needs the whole region."""
        return (
            f"a region must decode, got {self.where()} of '{path}', which fails with '{self.reason}'; "
            f"{remedy_for(self.reason)}"
        )

    def where(self) -> str:
        """Return the region's level and its corner in level-0 pixels, in words."""
        return f"x={self.region_lv0.left}, y={self.region_lv0.top} at level {self.level}"


@dataclass
class DamageLog:
    """A log of the regions that a reader could not decode, by level and outcome."""

    _regions: dict[tuple[int, bool], dict[Rectangle, Damage]] = field(default_factory=dict)

    def add(self, damage: Damage, white: bool) -> None:
        """Record a region, and whether it was left white or read from a finer level."""
        self._regions.setdefault((damage.level, white), {}).setdefault(damage.region_lv0, damage)

    def merge(self, other: DamageLog) -> None:
        """Record the regions in the log of another reader of the same slide."""
        for (_, white), regions in other._regions.items():
            for damage in regions.values():
                self.add(damage, white)

    def take(self) -> DamageLog | None:
        """Return the regions recorded since the last call, or None, and empty this log."""
        if not self._regions:
            return None
        taken, self._regions = DamageLog(self._regions), {}
        return taken

    def notes(self) -> tuple[str, ...]:
        """Return a sentence for each level and outcome."""
        return tuple(_note(list(regions.values()), white) for (_, white), regions in self._regions.items())


def _note(damages: list[Damage], white: bool) -> str:
    first, more = damages[0], len(damages) - 1
    further = f", nor can {more} more {'region' if more == 1 else 'regions'} of it" if more else ""
    outcome = "such regions count as glass" if white else "a finer level was read instead"
    return f"{first.where()} cannot be decoded ('{first.reason}'){further}; {outcome}"
