"""``maskattn info``: prints the metadata of a slide file or a slide model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskattn.cli.options import Debug, Series, Spacing
from maskattn.cli.reporting import errors_in_one_line, say, say_json
from maskattn.errors import SlideError

if TYPE_CHECKING:
    from maskattn.nn.slide_models.card import ModelCard

__all__ = ["info"]


def info(
    slide: Annotated[
        Path, typer.Argument(help="A slide file, or a slide model.", metavar="SLIDE|MODEL", show_default=False)
    ],
    spacing_um: Spacing = None,
    series: Series = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print the metadata of a slide file or a slide model."""
    with errors_in_one_line(debug):
        from maskattn.nn.slide_models.card import CONFIG, card_at

        if (card := card_at(slide)) is not None:
            _print_card(card, as_json)
            return

        from maskattn.slide.reader import SlideReader

        _check_exists(slide)
        try:
            with SlideReader(slide, spacing_um, series=series, isolated=True) as reader:
                facts = reader.describe()
        except SlideError as error:
            if slide.is_dir():
                raise SlideError(f"{error} (a slide model's folder holds {CONFIG}, which this one lacks)") from error
            raise
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


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise SlideError(
            f"maskattn info needs a slide file, a slide model's folder or a checkpoint, got path='{path}', which does "
            "not exist; check the path"
        )


def _print_card(card: ModelCard, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        say_json(asdict(card))
        return
    for name, value in card.lines():
        say(f"{name}: {value}")
