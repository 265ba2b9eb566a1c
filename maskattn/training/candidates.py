"""Candidates: the configurations from which each fold of a cross-validation chooses one on its validation part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from maskattn.training.run_config import read_config, settings_from
from maskattn.training.settings import TrainSettings

__all__ = ["read_candidates"]

# The settings that determine the patients and their targets, which all candidates share.
_SHARED = (
    *("features", "labels", "out", "task", "target", "classes", "time", "event", "slide_table", "split"),
    *("validation_share", "skip_missing", "fusion"),
)


def read_candidates(settings: TrainSettings, paths: Sequence[Path]) -> dict[str, TrainSettings]:
    """Read the settings of each candidate, by its file's name: those of the run, overridden by the file.

    Args:
        settings: the settings of the run.
        paths: YAML files; if there are none, the run itself is the only candidate, ``model``.

    Raises:
        ValueError: a file does not fit, changes a setting that all candidates share, or two files have one name.
    """
    shared_settings = replace(settings, out=None, split=None)
    if not paths:
        return {"model": shared_settings}
    found = {}
    for path in paths:
        changes = read_config(path, TrainSettings)
        if shared := [name for name in changes if name in _SHARED]:
            raise ValueError(
                f"candidates must share {', '.join(_SHARED)}, got {', '.join(shared)} in {path}; give it on the "
                "command line, or cross-validate twice and compare with maskattn evaluate"
            )
        if path.stem in found:
            raise ValueError(f"candidates must have files of different names, got two {path.stem!r}; rename one")
        found[path.stem] = settings_from(TrainSettings, {**asdict(shared_settings), **changes})
    return found
