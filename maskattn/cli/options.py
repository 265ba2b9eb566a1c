"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["Debug", "Force", "Ink", "Mask", "MaskValues", "Series", "Slide", "Spacing"]


def _plausible_spacing(spacing_um: float | None) -> float | None:
    from maskattn.slide.spacing import MAX_SPACING_UM, MIN_SPACING_UM

    if spacing_um is not None and not MIN_SPACING_UM <= spacing_um <= MAX_SPACING_UM:
        raise typer.BadParameter(
            f"a slide has {MIN_SPACING_UM:g} to {MAX_SPACING_UM:g} µm per level-0 pixel, got {spacing_um:g}; a 40x "
            "scan has about 0.25"
        )
    return spacing_um


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Slide = Annotated[Path, typer.Argument(help="A slide file.", metavar="SLIDE", show_default=False)]
Spacing = Annotated[
    float | None,
    typer.Option(
        "--spacing-um", help="µm per level-0 pixel, in place of what the slide says.", callback=_plausible_spacing
    ),
]
Series = Annotated[
    int | None,
    typer.Option("--series", help="Series of a TIFF that holds several (see info); by default the largest.", min=0),
]
Mask = Annotated[Path | None, typer.Option("--mask", help="Your own tissue mask of this slide, at any spacing.")]
Ink = Annotated[
    Literal["auto", "off"], typer.Option("--ink", help="auto leaves pen strokes out of the tissue, off keeps them.")
]
Force = Annotated[bool, typer.Option("--force", help="Go on where a slide was not scanned in bright field.")]
MaskValues = Annotated[
    list[int] | None, typer.Option("--mask-value", help="A label of the mask that means tissue (may be repeated).")
]
