"""``maskattn info``: what a slide file says of itself."""

from __future__ import annotations

from typing import Annotated

import typer

from maskattn.cli.options import Debug, Series, Slide, Spacing
from maskattn.cli.reporting import errors_in_one_line, say, say_json

__all__ = ["info"]


def info(
    slide: Slide,
    spacing_um: Spacing = None,
    series: Series = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print what a slide file says of itself."""
    with errors_in_one_line(debug):
        from maskattn.slide.reader import SlideReader

        with SlideReader(slide, spacing_um, series=series, isolated=True) as reader:
            facts = reader.describe()
    if as_json:
        say_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            say(f"{name}:")
            for key, text in value.items():
                say(f"  {key} = {text}")
        elif isinstance(value, list):
            say(f"{name}: {'; '.join(map(str, value)) or 'none'}")
        else:
            say(f"{name}: {value}")
