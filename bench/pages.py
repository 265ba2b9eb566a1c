"""Tables as they are made: each line is printed at once, and all are written where asked."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["publish"]


def publish(lines: Iterable[str], out: Path | None) -> None:
    """Print Markdown line by line, so that a run cut short has shown what it has; write it to ``out`` if given."""
    kept = []
    for line in lines:
        print(line, flush=True)
        kept.append(line)
    if out:
        out.write_text("\n".join(kept).rstrip() + "\n", encoding="utf-8")
