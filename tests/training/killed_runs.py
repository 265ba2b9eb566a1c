"""Runs a training that kills itself at several places, one after the other, until one is left to end.

``python killed_runs.py SOURCE FOLDER OUT@PLACE...`` where a source is ``features``, or ``patches`` or ``slides`` of the
stage "tile", and a place is ``batch:N`` (the N-th batch of this process), ``sync:N`` (in the middle of the N-th state
that is written), ``rename:NAME:N`` (before a file gets this name for the N-th time) or ``end``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from small_tiles import tile_settings

from maskattn.evaluation.splits import Split
from maskattn.training.cohort import cohort_of
from maskattn.training.patches import find_patches
from maskattn.training.settings import TrainSettings
from maskattn.training.train import train_model, validation_split
from maskattn.training.train_tiles import train_tiles
from maskattn.training.weak_labels import labelled_slides, with_tiles


class KilledAt:
    """Progress that ends its process without a word."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def looked_through(self, slide_id: str, done: int, slides: int) -> None:
        pass

    def batch_done(self, epoch: int, done: int, batches: int) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def epoch_done(self, row: dict[str, float], best: bool) -> None:
        pass


def settings_of(folder: Path) -> TrainSettings:
    return TrainSettings(
        features=folder / "features",
        labels=folder / "labels.csv",
        target="grade",
        task="multiclass",
        model="vit",
        width=16,
        epochs=5,
        patience=2,
        lr=3e-3,
        batch_size=3,
        accumulate=2,
        dropout=0.3,
        tiles_per_slide=12,
        drop_tokens=0.2,
        device="cpu",
    )


def run(source: str, folder: Path, out: Path, place: str) -> None:
    kind, _, number = place.partition(":")
    progress = KilledAt(int(number)) if kind == "batch" else None
    if kind == "sync":
        left = [int(number)]

        def killing_sync(descriptor: Any) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = killing_sync
    if kind == "rename":
        kill_before_renaming(*number.rsplit(":", 1))
    if source == "features":
        settings = settings_of(folder)
        cohort = cohort_of(settings)
        train_model(settings, cohort, validation_split(cohort, 0.3, 0), out, progress=progress)
        return
    settings = tile_settings(source, folder, dropout=0.3, drop_path=0.3, drop_tokens=0.2)
    if source == "patches":
        cohort = find_patches(settings)
        train_tiles(settings, cohort, validation_split(cohort, 0.3, 0), out, progress=progress)
    else:
        cohort, laid = with_tiles(*labelled_slides(settings), settings)
        train_tiles(settings, cohort, Split(("p0", "p1"), ("p2", "p3")), out, laid=laid, progress=progress)


def kill_before_renaming(name: str, number: str) -> None:
    left, rename = [int(number)], os.replace

    def killing_replace(source: Any, target: Any) -> None:
        left[0] -= Path(target).name == name
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = killing_replace


def main() -> None:
    torch.set_num_threads(1)  # a process with threads cannot be forked
    source, folder, *runs = sys.argv[1:]
    for out, _, place in (one.partition("@") for one in runs):
        child = os.fork()
        if not child:
            run(source, Path(folder), Path(out), place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        expected = 0 if place == "end" else signal.SIGKILL
        assert status == expected, f"{place}: the process ended with {status}"


if __name__ == "__main__":
    main()
