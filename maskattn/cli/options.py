"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Debug", "Mask", "MaskValues", "Slide", "Spacing"]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Slide = Annotated[Path, typer.Argument(help="A slide file.", metavar="SLIDE", show_default=False)]
Spacing = Annotated[
    float | None, typer.Option("--spacing-um", help="µm per level-0 pixel, in place of what the slide says.", min=0.0)
]
Mask = Annotated[Path | None, typer.Option("--mask", help="Your own tissue mask of this slide, at any spacing.")]
MaskValues = Annotated[
    list[int] | None, typer.Option("--mask-value", help="A label of the mask that means tissue (may be repeated).")
]
