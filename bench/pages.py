"""Tables as they are made: each line is printed at once, and all are written where asked; and the measured commit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

__all__ = ["commit_id", "publish"]


def publish(lines: Iterable[str], out: Path | None) -> None:
    """Print Markdown line by line, so that a run cut short has shown what it has; write it to ``out`` if given."""
    kept = []
    for line in lines:
        print(line, flush=True)
        kept.append(line)
    if out:
        out.write_text("\n".join(kept).rstrip() + "\n", encoding="utf-8")


def commit_id() -> str:
    """The short id of the commit that is measured."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"
