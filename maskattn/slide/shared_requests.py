"""What every command that goes through slides may be asked for: the fields that requests have in common."""

from __future__ import annotations

import operator
from typing import Any

from maskattn.slide.asked import asked
from maskattn.slide.fleet.sharing import Sharing

__all__ = [
    "BATCH_SIZE",
    "CLAIM_TIMEOUT",
    "FORCE",
    "INK",
    "LIMIT",
    "MASK_VALUES",
    "ORDER",
    "RETRY_FAILED",
    "SERIES",
    "SHARD",
    "WORKERS",
    "sharing_of",
    "EXCLUDE",
    "EXCLUDE_CLASSES",
    "MASK_CLASSES",
    "ROI",
    "ROI_CLASSES",
    "slide_spacing",
]

MASK_VALUES = asked("--mask-value", "A label of the mask that means tissue (may be repeated).")
MASK_CLASSES = asked("--mask-class", "A class of a GeoJSON mask that means tissue (may be repeated).")
ROI = asked("--roi", "Look only here: a GeoJSON file, or a folder with SLIDE_ID.geojson for each slide.")
ROI_CLASSES = asked("--roi-class", "A class of --roi that counts (may be repeated).")
EXCLUDE = asked("--exclude", "Leave this out: a GeoJSON file, or a folder of them, as for --roi.")
EXCLUDE_CLASSES = asked("--exclude-class", "A class of --exclude that counts (may be repeated).")
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
# How slides are shared among processes, which changes nothing of what becomes of a slide.
CLAIM_TIMEOUT = asked(
    "--claim-timeout",
    "Seconds without a sign after which a process has ended, and others take its slides over.",
    minimum=1,
    recorded=False,
    serves=None,
)
RETRY_FAILED = asked(
    "--retry-failed",
    "Try slides again that failed in another process of this run, before this one began.",
    recorded=False,
    serves=None,
)
SHARD = asked("--shard", "I/N: run the I-th of N shares of the slides.", recorded=False, serves=None)
LIMIT = asked("--limit", "Run at most so many slides, and leave the rest.", minimum=1, recorded=False, serves=None)
ORDER = asked("--order", "Of the slides: given, or large-first.", recorded=False, serves=None)


def sharing_of(settings: Any) -> Sharing:
    """How a request's slides are to be shared."""
    return Sharing(settings.claim_timeout_s, settings.retry_failed, settings.shard, settings.limit, settings.order)


def slide_spacing(flag: str) -> dict[str, object]:
    """The slide's own spacing, by this flag: recorded and compared with the slide, whose spacing it becomes."""
    return dict(asked(flag, "µm per level-0 pixel, in place of what the slide says.", recorded=False, serves=None))
