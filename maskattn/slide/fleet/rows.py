"""A member's rows of ``summary.csv``: one process writes the table at a time, and the others keep theirs beside it.

Nobody waits for the table while there are slides to run. A row that cannot be written at once goes to the member's own
file, and from there into the table when it is free, when the member leaves, or, where it was killed, when another one
puts the fleet's folder away.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from maskattn.slide.fleet.claims import Claims
from maskattn.slide.fleet.folders import in_folder
from maskattn.slide.fleet.members import Watch
from maskattn.slide.summary import append_row, read_summary, tidy_summary

__all__ = ["MemberRows", "rows_beside"]

_TABLE = "summary"
_LOOK_EVERY_S = 0.02


def rows_beside(folder: Path) -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    """The rows that members keep in a folder beside the table, by the member's token."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            if name.endswith(".csv") and not name.startswith("."):
                with contextlib.suppress(OSError, ValueError):
                    yield name.removesuffix(".csv"), read_summary(folder / name)


class MemberRows:
    """The rows of one member.

    Args:
        table: the run's ``summary.csv``.
        folder: of the rows that are kept beside it.
        token: the member's.
        claims: the member's claims in a folder where the table is claimed too.
    """

    def __init__(self, table: Path, folder: Path, token: str, claims: Claims) -> None:
        self._table = table
        self._folder = folder
        self._own = folder / f"{token}.csv"
        self._claims = claims
        self._pending = False

    def add(self, row: Mapping[str, str]) -> None:
        """Put a slide's row into the table, or beside it where another process writes to the table.

        Raises:
            ValueError: the table is none.
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
        """Put what is kept beside the table into it, and leave one row of each slide there.

        Raises:
            ValueError, OSError: as :meth:`add`.
        """
        with self.alone():
            if self._pending:
                self._take_in(self._own)
            tidy_summary(self._table)
        self._pending = False

    def take_in_all(self, watch: Watch) -> None:
        """Put this member's rows and those of members that have ended into the table; within :meth:`alone`."""
        for beside in sorted(self._folder.glob("*.csv")):
            if beside == self._own or watch.has_ended(beside.stem):
                self._take_in(beside)
        self._pending = False
        tidy_summary(self._table)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other process writes to the table; waits for it."""
        while (claim := self._claims.try_claim(_TABLE)) is None:
            time.sleep(_LOOK_EVERY_S)
        try:
            yield
        finally:
            claim.release()

    def _take_in(self, beside: Path) -> None:
        for row in read_summary(beside).values():
            append_row(self._table, row)
        beside.unlink(missing_ok=True)
