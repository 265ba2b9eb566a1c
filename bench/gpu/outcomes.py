"""The outcome of each test or command: a log that many processes append to and that a later call continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Outcome", "OutcomeLog", "fingerprint"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one test or command.

    Attributes:
        name: the test's node id, or the command's name.
        outcome: "begun", "passed", "failed", "skipped", "crashed" (its process died) or "timed out".
        seconds: how long it took.
        reason: why it did not pass.
    """

    name: str
    outcome: str
    seconds: float
    reason: str = ""


class OutcomeLog:
    """A file of outcomes, one line of JSON each; outcomes of other sources are ignored.

    Args:
        path: path of the file, which need not exist.
        of: the fingerprint of the sources that are tested.
    """

    def __init__(self, path: Path, of: str) -> None:
        self.path, self.of = path, of

    def add(self, outcome: Outcome) -> None:
        """Append a line in a single write, so that lines of other processes do not interleave."""
        line = json.dumps({"of": self.of, **asdict(outcome)}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def latest(self) -> dict[str, Outcome]:
        """Return the latest outcome by name, "begun" if the test or command never ended."""
        if not self.path.exists():
            return {}
        found: dict[str, Outcome] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                # An incomplete line from before the machine was shut down.
                continue
            if values.pop("of") == self.of:
                outcome = Outcome(**values)
                found[outcome.name] = outcome
        return found

    def ended(self) -> dict[str, Outcome]:
        """Return the outcomes of :meth:`latest` that ended."""
        return {name: outcome for name, outcome in self.latest().items() if outcome.outcome != "begun"}


def fingerprint(root: Path, of: Iterable[str] = ("maskattn", "csrc", "tests", "bench/gpu")) -> str:
    """Return 12 hex digits of a hash of the sources, which identifies them even in a checkout without git history.

    Args:
        root: the root of the checkout.
        of: files, and folders whose sources count.
    """
    digest = hashlib.sha256()
    kinds = {".py", ".c", ".cpp", ".hpp", ".mk"}
    for each in of:
        inside = [root / each] if (root / each).is_file() else (root / each).rglob("*")
        for path in sorted(path for path in inside if path.suffix in kinds):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
