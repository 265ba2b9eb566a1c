"""The facts about a slide for the page: its size and spacing, its scores, the verdicts on its maps, and notes."""

from __future__ import annotations

import math
from typing import Any

from maskattn.slide.names import as_text
from maskattn.viewer.opened_slide import OpenedSlide

__all__ = ["about_slide", "finite"]


def about_slide(opened: OpenedSlide) -> dict[str, Any]:
    """Return the facts about the slide for the page, as a JSON object."""
    pyramid, entry, table = opened.pyramid, opened.entry, opened.table
    about: dict[str, Any] = {
        "id": as_text(entry.slide_id),
        "width": pyramid.width_px,
        "height": pyramid.height_px,
        "levels": pyramid.levels,
        "spacing_um": opened.spacing_um,
        "problem": as_text(opened.problem),
        "notes": [],
        "scores": {},
        "verdicts": {},
        "maps": [],
    }
    prediction = None if entry.finished is None else entry.finished.prediction
    if prediction is not None:
        notes = (*prediction.tissue.get("notes", ()), *prediction.notes)
        about |= {
            "spacing_um": prediction.slide.spacing_um,
            "notes": [as_text(str(note)) for note in notes],
            "scores": {name: finite(score) for name, score in prediction.scores.items()},
            "prediction": prediction.prediction,
            "verdicts": {name: str(one.get("map_check", "")) for name, one in prediction.maps.items()},
            "model": prediction.model.name,
            "model_note": prediction.model.note,
        }
    if table is not None:
        about |= {
            "maps": [*table.classes, "attention"],
            "method": table.method,
            "tile_lv0": table.tile_lv0,
            "tokens": table.tokens_hw is not None,
        }
    return about


def finite(value: float) -> float | None:
    """Return a number for JSON; None if it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None
