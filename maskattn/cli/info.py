"""``maskattn info``: prints the metadata of a slide file or a slide model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskattn.cli.options import CacheDir, CacheGb, Debug, Series, Spacing
from maskattn.cli.reporting import errors_in_one_line, say, say_json
from maskattn.errors import SlideError
from maskattn.slide.remote.cache import DEFAULT_GB

if TYPE_CHECKING:
    from maskattn.nn.slide_models.card import ModelCard
    from maskattn.slide.remote import CacheSettings

__all__ = ["info"]


def info(
    slide: Annotated[
        str,
        typer.Argument(help="A slide file, its URL, or a slide model.", metavar="SLIDE|MODEL", show_default=False),
    ],
    spacing_um: Spacing = None,
    series: Series = None,
    cache_dir: CacheDir = None,
    cache_gb: CacheGb = DEFAULT_GB,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print the metadata of a slide file or a slide model."""
    with errors_in_one_line(debug):
        from maskattn.nn.slide_models.card import CONFIG, card_at
        from maskattn.slide.remote import CacheSettings, locate

        path, origin = locate(slide)
        if origin is None:
            if (card := card_at(path)) is not None:
                _print_card(card, as_json)
                return
            _check_exists(path)
        try:
            facts = _facts_of(slide, spacing_um, series, CacheSettings(cache_dir, cache_gb, series=series))
        except SlideError as error:
            if path.is_dir():
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


def _facts_of(slide: str, spacing_um: float | None, series: int | None, cache: CacheSettings) -> dict[str, Any]:
    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.names import id_of_file
    from maskattn.slide.reader import SlideReader
    from maskattn.slide.remote import Copies, locate

    path, origin = locate(slide)
    job = SlideJob(id_of_file(path), path, origin=origin)
    with (
        Copies(cache) as copies,
        copies.local(job) as here,
        SlideReader(here.path, spacing_um, series=series, isolated=True) as reader,
    ):
        return {**reader.describe(), "path": job.where}


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
