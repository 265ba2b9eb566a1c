"""The fields that the requests of all commands on slides have in common."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maskattn.slide.asked import asked
from maskattn.slide.fleet.sharing import Sharing
from maskattn.slide.remote.cache import DEFAULT_GB, CacheSettings

__all__ = ["SharedSettings", "slide_spacing"]


@dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """How slides are read and shared among processes, independent of the command.

    Attributes:
        mask_values: the labels of a mask that mean tissue; None = all but 0.
        mask_classes: the classes of a GeoJSON mask that mean tissue; None = all but QuPath's "Ignore*".
        roi: GeoJSON outlines of the region of interest, or a folder of them, one for each slide.
        roi_classes: the classes of ``roi`` that count; None = all but QuPath's "Ignore*".
        exclude: GeoJSON outlines of areas to leave out, or a folder of them, one for each slide.
        exclude_classes: the classes of ``exclude`` that count; None = all but QuPath's "Ignore*".
        ink: "auto" removes pen strokes from the segmented tissue, "off" keeps them.
        force: also run slides that were not scanned in bright field.
        series: the index of the series in files with several; None = the largest.
        batch_size: the number of tiles encoded at a time; bounds the memory.
        tokens_per_batch: encode as many tiles at a time as have so many kept tokens together, at least one; None =
            ``batch_size`` tiles.
        workers: the number of processes that decode tiles; 0 = decode in this process; None = some for large slides.
        claim_timeout_s: seconds without a sign of life after which other processes take over a process's slides.
        retry_failed: retry slides that failed in another process of the run before this one started.
        shard: "I/N" = run only the I-th of N shares of the slides.
        limit: run at most so many slides; None = all.
        order: the order of the slides, "given" or "large-first"; None = as given.
        cache_dir: the folder for copies of remote slides while they run; None = one in the system's temporary folder.
        cache_gb: the most that all copies in it take together, in GB of 10⁹ bytes.
        copy_whole: copy remote slides whole, also those whose parts can be read where they lie.
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
        metadata=asked(
            "--roi", "Use only the tissue in these outlines: a GeoJSON file, or a folder with SLIDE_ID.geojson files."
        ),
    )
    roi_classes: tuple[str, ...] | None = field(
        default=None, metadata=asked("--roi-class", "A class of --roi that counts (may be repeated).")
    )
    exclude: Path | None = field(
        default=None,
        metadata=asked("--exclude", "Leave out these outlines: a GeoJSON file, or a folder of them, as for --roi."),
    )
    exclude_classes: tuple[str, ...] | None = field(
        default=None, metadata=asked("--exclude-class", "A class of --exclude that counts (may be repeated).")
    )
    ink: Literal["auto", "off"] = field(
        default="auto", metadata=asked("--ink", "auto removes pen strokes from the tissue, off keeps them.")
    )
    force: bool = field(
        default=False,
        # A slide that passed without force passes with it too.
        metadata=asked("--force", "Also run slides that were not scanned in bright field.", serves=operator.le),
    )
    series: int | None = field(
        default=None,
        metadata=asked("--series", "Series of a TIFF file with several (see info); by default the largest.", minimum=0),
    )
    batch_size: int = field(
        default=32,
        metadata=asked(
            "--batch-size", "Tiles encoded at a time; bounds the memory.", minimum=1, maximum=65536, serves=None
        ),
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata=asked(
            "--tokens-per-batch",
            "Tokens encoded at a time, in place of --batch-size: full tiles are fewer at a time than sparse ones.",
            minimum=1,
            maximum=16_777_216,
            serves=None,
        ),
    )
    workers: int | None = field(
        default=0,
        # A Python script that starts processes must guard its entry point, so only the command line does by default.
        metadata=asked(
            "--workers",
            "Processes that decode tiles; by default some for large slides.",
            minimum=0,
            maximum=512,
            default=None,
            serves=None,
        ),
    )
    # How slides are shared among processes does not affect their outputs.
    claim_timeout_s: float = field(
        default=300.0,
        metadata=asked(
            "--claim-timeout",
            "Seconds without a sign of life after which other processes take over a process's slides.",
            minimum=1,
            recorded=False,
            serves=None,
        ),
    )
    retry_failed: bool = field(
        default=False,
        metadata=asked(
            "--retry-failed",
            "Retry slides that failed in another process of this run before this one started.",
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
        metadata=asked("--limit", "Run at most so many slides.", minimum=1, recorded=False, serves=None),
    )
    order: Literal["given", "large-first"] | None = field(
        default=None,
        metadata=asked(
            "--order",
            "Order of the slides: given or large-first; by default given, and with --devices large-first.",
            recorded=False,
            serves=None,
        ),
    )

    cache_dir: Path | None = field(
        default=None,
        metadata=asked(
            "--cache-dir",
            "Folder for copies of remote slides while they run; by default one for temporary files.",
            recorded=False,
            serves=None,
        ),
    )
    cache_gb: float = field(
        default=DEFAULT_GB,
        metadata=asked(
            "--cache-gb", "The most that all copies in it take, in GB.", minimum=0, recorded=False, serves=None
        ),
    )

    copy_whole: bool = field(
        default=False,
        metadata=asked(
            "--copy-whole",
            "Copy remote slides whole, also those that can be read in parts.",
            recorded=False,
            serves=None,
        ),
    )

    @property
    def cache(self) -> CacheSettings:
        """How remote slides are read, and where they are copied to."""
        return CacheSettings(self.cache_dir, self.cache_gb, self.copy_whole, self.series)

    @property
    def sharing(self) -> Sharing:
        """How the slides are shared among processes."""
        return Sharing(self.claim_timeout_s, self.retry_failed, self.shard, self.limit, self.order or "given")


def slide_spacing(flag: str) -> dict[str, object]:
    """Return the metadata of a slide's spacing with this flag; the slide's record states the spacing it results in."""
    return dict(asked(flag, "µm per level-0 pixel; overrides the slide's metadata.", recorded=False, serves=None))
