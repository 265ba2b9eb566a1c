"""What every command that goes through slides may be asked for: the fields that requests have in common."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maskattn.slide.asked import asked
from maskattn.slide.fleet.sharing import Sharing

__all__ = ["SharedSettings", "slide_spacing"]


@dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """How slides are gone through, whatever is made of them.

    Attributes:
        mask_values: the labels of a user's mask that mean tissue; None = any but 0.
        mask_classes: the classes of a mask of outlines that mean tissue; None = all but QuPath's "Ignore*".
        roi: GeoJSON outlines of the region of interest, or a folder of them, one for each slide.
        roi_classes: the classes in it that count; None as above.
        exclude: GeoJSON outlines of what is left out, or a folder of them.
        exclude_classes: the classes in it that count; None as above.
        ink: "auto" takes pen strokes out of the tissue that is found, "off" keeps them.
        force: run slides that were not scanned in bright field too.
        series: which series of files that hold several; None = the largest.
        batch_size: tiles encoded at a time; bounds the memory.
        workers: processes that decode tiles; 0 = decode in this one; None = some, where a slide is large enough.
        claim_timeout_s: so long may a process that runs a slide give no sign before others take the slide over.
        retry_failed: try slides again that failed in another process of the run before this one began.
        shard: "I/N" = the I-th of N shares of the slides alone.
        limit: run at most so many slides, and leave the rest.
        order: of the slides, "given" or "large-first"; None = as given.
    """

    mask_values: tuple[int, ...] | None = field(
        default=None, metadata=asked("--mask-value", "A label of the mask that means tissue (may be repeated).")
    )
    mask_classes: tuple[str, ...] | None = field(
        default=None,
        metadata=asked("--mask-class", "A class of a GeoJSON mask that means tissue (may be repeated)."),
    )
    roi: Path | None = field(
        default=None,
        metadata=asked("--roi", "Look only here: a GeoJSON file, or a folder with SLIDE_ID.geojson for each slide."),
    )
    roi_classes: tuple[str, ...] | None = field(
        default=None, metadata=asked("--roi-class", "A class of --roi that counts (may be repeated).")
    )
    exclude: Path | None = field(
        default=None, metadata=asked("--exclude", "Leave this out: a GeoJSON file, or a folder of them, as for --roi.")
    )
    exclude_classes: tuple[str, ...] | None = field(
        default=None, metadata=asked("--exclude-class", "A class of --exclude that counts (may be repeated).")
    )
    ink: Literal["auto", "off"] = field(
        default="auto", metadata=asked("--ink", "auto leaves pen strokes out of the tissue, off keeps them.")
    )
    force: bool = field(
        default=False,
        # A slide that passed without force passes with it too.
        metadata=asked("--force", "Go on where a slide was not scanned in bright field.", serves=operator.le),
    )
    series: int | None = field(
        default=None,
        metadata=asked(
            "--series", "Series of a TIFF that holds several (see info); by default the largest.", minimum=0
        ),
    )
    batch_size: int = field(
        default=32,
        metadata=asked("--batch-size", "Tiles at a time; bounds the memory.", minimum=1, maximum=65536, serves=None),
    )
    workers: int | None = field(
        default=0,
        # A script that starts processes must guard its entry, so that in Python they are asked for, and here they are
        # not.
        metadata=asked(
            "--workers",
            "Processes that decode tiles; by default some for large slides.",
            minimum=0,
            maximum=512,
            default=None,
            serves=None,
        ),
    )
    # How slides are shared among processes changes nothing of what becomes of a slide.
    claim_timeout_s: float = field(
        default=300.0,
        metadata=asked(
            "--claim-timeout",
            "Seconds without a sign after which a process has ended, and others take its slides over.",
            minimum=1,
            recorded=False,
            serves=None,
        ),
    )
    retry_failed: bool = field(
        default=False,
        metadata=asked(
            "--retry-failed",
            "Try slides again that failed in another process of this run, before this one began.",
            recorded=False,
            serves=None,
        ),
    )
    shard: str | None = field(
        default=None,
        metadata=asked("--shard", "I/N: run the I-th of N shares of the slides.", recorded=False, serves=None),
    )
    limit: int | None = field(
        default=None,
        metadata=asked(
            "--limit", "Run at most so many slides, and leave the rest.", minimum=1, recorded=False, serves=None
        ),
    )
    order: Literal["given", "large-first"] | None = field(
        default=None,
        metadata=asked(
            "--order",
            "Of the slides: given, or large-first; by default as given, and with --devices large-first.",
            recorded=False,
            serves=None,
        ),
    )

    @property
    def sharing(self) -> Sharing:
        """How the slides are to be shared."""
        return Sharing(self.claim_timeout_s, self.retry_failed, self.shard, self.limit, self.order or "given")


def slide_spacing(flag: str) -> dict[str, object]:
    """The slide's own spacing, by this flag: recorded and compared with the slide, whose spacing it becomes."""
    return dict(asked(flag, "µm per level-0 pixel, in place of what the slide says.", recorded=False, serves=None))
