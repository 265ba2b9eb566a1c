"""What every command that goes through slides may be asked for: the fields that requests have in common."""

from __future__ import annotations

import operator

from maskattn.slide.asked import asked

__all__ = ["BATCH_SIZE", "FORCE", "INK", "MASK_VALUES", "SERIES", "WORKERS", "slide_spacing"]

MASK_VALUES = asked("--mask-value", "A label of the mask that means tissue (may be repeated).")
INK = asked("--ink", "auto leaves pen strokes out of the tissue, off keeps them.")
# A slide that passed without force passes with it too.
FORCE = asked("--force", "Go on where a slide was not scanned in bright field.", serves=operator.le)
SERIES = asked("--series", "Series of a TIFF that holds several (see info); by default the largest.", minimum=0)
BATCH_SIZE = asked("--batch-size", "Tiles at a time; bounds the memory.", minimum=1, maximum=65536, serves=None)
# A script that starts processes must guard its entry, so that in Python they are asked for, and here they are not.
WORKERS = asked(
    "--workers",
    "Processes that decode tiles; by default some for large slides.",
    minimum=0,
    maximum=512,
    default=None,
    serves=None,
)


def slide_spacing(flag: str) -> dict[str, object]:
    """The slide's own spacing, by this flag: recorded and compared with the slide, whose spacing it becomes."""
    return dict(asked(flag, "µm per level-0 pixel, in place of what the slide says.", recorded=False, serves=None))
