"""Writes ``api.md``, the list of public names: ``python docs/write_api.py``.

A row is a name and the first line of its docstring; ``help(name)`` and the source have the rest.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from pathlib import Path

PAGE = Path(__file__).with_name("api.md")
# Module → what a reader finds there.
MODULES = {
    "maskattn": "The operations on packed and masked tokens, and packing.",
    "maskattn.attention": "The same operations, with their specification as `reference`.",
    "maskattn.distributed": "The operations over a process group: one slide over several devices.",
    "maskattn.nn": "Layers, models and how others' models become ours.",
    "maskattn.explain": "Explanations; `METHODS` lists those that the command line offers.",
    "maskattn.explain.baselines": "What explanations are compared with.",
    "maskattn.explain.metrics": "How explanations are judged.",
    "maskattn.slide.reader": "A slide file.",
    "maskattn.slide.tissue.finding": "Where the tissue is.",
    "maskattn.slide.grid": "Tiles and tokens of a slide.",
    "maskattn.slide.manifest": "Which slides are run.",
    "maskattn.slide.layouts": "Tile features and coordinates as other tools write and read them.",
    "maskattn.slide.layouts.hierarchical": "Features of regions' patches, as slide2vec stores them.",
    "maskattn.slide.regions": "A slide's regions through HIPT, one by one.",
    "maskattn.slide.pipeline": "One slide, from file to outputs.",
    "maskattn.slide.run": "Many slides.",
    "maskattn.demo.synthetic": "Slides with a known answer.",
}


def page() -> str:
    """The whole page."""
    lines = [
        "# Public names",
        "",
        "Written by `python docs/write_api.py` from the docstrings, which have shapes, units, errors and sources:",
        "`help(maskattn.packed_attention)`. What is not here may change without notice.",
    ]
    for name, purpose in MODULES.items():
        module = importlib.import_module(name)
        lines += ["", f"## {name}", "", purpose, "", "| name | purpose |", "|---|---|"]
        lines += [f"| `{each}` | {_first_line(getattr(module, each))} |" for each in sorted(_public(module))]
    return "\n".join(lines) + "\n"


def _public(module: object) -> list[str]:
    return [name for name in module.__all__ if not name.startswith("__")]  # type: ignore[attr-defined]  # a module


def _first_line(value: object) -> str:
    """What the docstring of a class or function begins with; of a constant, what it is."""
    if choices := typing.get_args(value):
        return "One of " + ", ".join(f"`{choice!r}`" for choice in choices) + "."
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return f"A constant of type `{type(value).__name__}`."
    return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
