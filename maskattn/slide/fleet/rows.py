"""A member's rows of ``summary.csv``: one process at a time writes to the table, and the others buffer their rows.

No member waits for the table while there are slides to run. A row that cannot be written at once goes to a file of the
member, and from there into the table: when the table is free, when the member leaves, or, if the member was killed,
when the last member leaves.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from maskattn.slide.fleet.claims import Claims
from maskattn.slide.fleet.folders import in_folder
from maskattn.slide.fleet.members import Watch
from maskattn.slide.summary import append_row, read_summary, tidy_summary

__all__ = ["MemberRows", "rows_beside"]

_TABLE = "summary"
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.02, 2.0


def rows_beside(folder: Path) -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    """Yield each member's token and its buffered rows by slide."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            if name.endswith(".csv") and not name.startswith("."):
                with contextlib.suppress(OSError, ValueError):
                    yield name.removesuffix(".csv"), read_summary(folder / name)


class MemberRows:
    """The rows of one member.

    Args:
        table: the run's ``summary.csv``.
        folder: the folder of buffered rows.
        token: the member's token.
        claims: the member's claims in the folder in which the table is claimed.
    """

    def __init__(self, table: Path, folder: Path, token: str, claims: Claims) -> None:
        self._table = table
        self._folder = folder
        self._own = folder / f"{token}.csv"
        self._claims = claims
        self._pending = False

    def add(self, row: Mapping[str, str]) -> None:
        """Add a slide's row to the table, or buffer it if another process is writing to the table.

        Raises:
            ValueError: the table is not a summary.
            OSError: the table cannot be written.
        """
        claim = self._claims.try_claim(_TABLE)
        if claim is None:
            in_folder(self._own, lambda: append_row(self._own, row))
            self._pending = True
            return
        try:
            if self._pending:
                self._take_in(self._own)
            append_row(self._table, row)
        finally:
            claim.release()
        self._pending = False

    def finish(self) -> None:
        """Add the buffered rows to the table; the last member removes all but the last row of each slide.

        Raises:
            ValueError, OSError: as for :meth:`add`.
        """
        if self._pending:
            with self.alone():
                self._take_in(self._own)
            self._pending = False

    def take_in_all(self, watch: Watch) -> None:
        """Add the buffered rows of this member and of ended members to the table; call within :meth:`alone`."""
        for buffered in sorted(self._folder.glob("*.csv")):
            if buffered == self._own or watch.has_ended(buffered.stem):
                self._take_in(buffered)
        self._pending = False
        tidy_summary(self._table)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process writes to the table, and keep it so within the context."""
        wait_s = _SHORTEST_WAIT_S
        while (claim := self._claims.try_claim(_TABLE)) is None:
            time.sleep(random.uniform(0, wait_s))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        try:
            yield
        finally:
            claim.release()

    def _take_in(self, buffered: Path) -> None:
        for row in read_summary(buffered).values():
            append_row(self._table, row)
        buffered.unlink(missing_ok=True)
