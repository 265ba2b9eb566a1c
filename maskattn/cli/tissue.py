"""``maskattn tissue``: finds the tissue of a slide and draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskattn.cli.options import (
    CacheDir,
    CacheGb,
    Debug,
    Exclude,
    ExcludeClasses,
    Force,
    Ink,
    Mask,
    MaskClasses,
    MaskValues,
    Roi,
    RoiClasses,
    Series,
    Slide,
    Spacing,
)
from maskattn.cli.pictures import picture_path, picture_written
from maskattn.cli.reporting import errors_in_one_line, say_json
from maskattn.slide.remote.cache import DEFAULT_GB

__all__ = ["tissue"]

_THUMBNAIL_PX = 2048


def tissue(
    slide: Slide,
    out: Annotated[
        Path | None, typer.Option("--out", help="PNG, or folder for it; by default SLIDE_tissue.png in this folder.")
    ] = None,
    mask: Mask = None,
    mask_value: MaskValues = None,
    mask_class: MaskClasses = None,
    roi: Roi = None,
    roi_class: RoiClasses = None,
    exclude: Exclude = None,
    exclude_class: ExcludeClasses = None,
    ink: Ink = "auto",
    force: Force = False,
    spacing_um: Spacing = None,
    series: Series = None,
    cache_dir: CacheDir = None,
    cache_gb: CacheGb = DEFAULT_GB,
    debug: Debug = False,
) -> None:
    """Show where the tissue of a slide is.

    An overlay is written as PNG; its statistics go to stdout as JSON.
    """
    with errors_in_one_line(debug):
        from maskattn.slide.manifest import SlideJob
        from maskattn.slide.names import id_of_file
        from maskattn.slide.outlines.rules import check_classes_of
        from maskattn.slide.overlay import write_mask_overlay
        from maskattn.slide.reader import SlideReader
        from maskattn.slide.remote import CacheSettings, Copies, locate
        from maskattn.slide.tissue import find_tissue, limit_tissue, load_mask
        from maskattn.slide.tissue.bright_field import require_bright_field

        if mask_value and mask is None:
            raise ValueError(
                f"--mask-value names labels of a mask, got {', '.join(map(str, mask_value))} and no mask; give one "
                "with --mask, or leave the values out"
            )
        if ink == "off" and mask is not None:
            raise ValueError(
                f"--ink controls how tissue is segmented, got --ink off with the mask {mask}; leave out one of the two"
            )
        for flag, classes, of in (
            ("--mask-class", mask_class, mask),
            ("--roi-class", roi_class, roi),
            ("--exclude-class", exclude_class, exclude),
        ):
            check_classes_of(flag, classes, with_file=of is not None)
        slide_path, origin = locate(slide)
        mask_path, mask_origin = (None, None) if mask is None else locate(mask)
        of_slide = id_of_file(slide_path)
        given = [file for file in (mask_path, roi, exclude) if file is not None]
        path = picture_path(out, f"{of_slide}_tissue.png", [slide_path, *given])
        job = SlideJob(of_slide, slide_path, mask_path, origin=origin, mask_origin=mask_origin)
        with (
            Copies(CacheSettings(cache_dir, cache_gb, series=series)) as copies,
            copies.local(job) as here,
            SlideReader(here.path, spacing_um, series=series, isolated=True) as reader,
        ):
            info = reader.info
            labels = tuple(mask_value) if mask_value else None
            names = tuple(mask_class) if mask_class else None
            if here.mask_path is not None and not force:
                require_bright_field(reader)
            if here.mask_path is None:
                found = find_tissue(reader, ink=ink, force=force)
            else:
                found = load_mask(here.mask_path, info, labels, tissue_classes=names, reader=reader)
            found = limit_tissue(found, info, of_slide, (roi, roi_class or None), (exclude, exclude_class or None))
            thumbnail = reader.thumbnail(_THUMBNAIL_PX)
            with picture_written(path):
                write_mask_overlay(path, thumbnail, found, info.width_px)
        height, width = found.mask_HW.shape
        area_mm2 = info.width_px * info.height_px * info.spacing_um**2 / 1e6
        statistics = {
            "slide": job.where,
            "method": found.method,
            "tissue_fraction": found.tissue_fraction,
            "tissue_mm2": found.tissue_fraction * area_mm2,
            "slide_mm2": area_mm2,
            "mask_px": [width, height],
            "mask_spacing_um": found.spacing_um,
            "notes": list(found.notes),
            "overlay": str(path),
        }
    say_json(statistics)
