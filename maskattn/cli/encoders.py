"""``maskattn encoders``: prints the table of encoders, or all that is known about one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from maskattn.cli.options import Debug
from maskattn.cli.reporting import errors_in_one_line, say, say_json

__all__ = ["encoders"]


def encoders(
    name: Annotated[
        str | None, typer.Argument(help="An encoder, to print all that is known about it.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the encoders that have a short name.

    Name any other encoder of timm or the Hugging Face hub as timm:NAME or hf-hub:ORG/NAME, your own by file or folder.
    """
    with errors_in_one_line(debug):
        from maskattn.nn.encoders.table import ENCODERS, entry_named, nearest_names

        rows = list(ENCODERS.values())
        if name is not None:
            entry = entry_named(name)
            if entry is None:
                close = ", ".join(nearest_names(name)) or "none like it"
                raise ValueError(f"the table must have the encoder, got {name!r}; the nearest names: {close}")
            rows = [entry]
    if as_json:
        say_json([asdict(row) | {"arguments": dict(row.arguments)} for row in rows])
        return
    if name is not None:
        for fact, value in asdict(rows[0]).items():
            if value not in ("", None, {}):
                say(f"{fact}: {value}")
        return
    say(f"{'name':<13} {'width':>5} {'tile':>9} {'µm/px':>5}  {'masked':<6} {'gated':<5} {'licence':<36} weights")
    for row in rows:
        tile = f"{row.tile_px}" if row.patch_px == row.tile_px else f"{row.patch_px} → {row.tile_px}"
        spacing = "?" if row.spacing_um is None else f"{row.spacing_um:g}"
        masked, gated = "no" if row.why_not else "yes", "yes" if row.gated else "no"
        say(
            f"{row.name:<13} {row.embed_dim:>5} {tile:>9} {spacing:>5}  {masked:<6} {gated:<5} {row.licence:<36} "
            f"{row.hub_id or '-'}"
        )
