"""The log of a training: ``log.csv``, with a row per epoch, and TensorBoard's events if it is installed."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskattn.files import replacing

__all__ = ["TensorBoard", "write_log"]


def write_log(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the rows as a CSV file, atomically."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _shown(value) for name, value in row.items()} for row in rows)


def _shown(value: float) -> float | int | str:
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


class TensorBoard:
    """Scalars for TensorBoard; without effect if it is not installed.

    Args:
        folder: the folder of the events.
        first_epoch: events of an earlier run from this epoch on are discarded.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self._writer = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def add(self, row: Mapping[str, float]) -> None:
        """Write an epoch's row."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, int(row["epoch"]))
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
