"""Candidates: configurations of which each fold of a cross-validation chooses one on its own training patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from maskattn.training.run_config import read_config, settings_from
from maskattn.training.settings import TrainSettings

__all__ = ["read_candidates"]

# What says which patients there are and what is predicted of them: one for all candidates.
_SHARED = (
    *("features", "labels", "out", "task", "target", "classes", "time", "event", "slide_table", "split"),
    *("validation_share", "skip_missing", "fusion"),
)


def read_candidates(settings: TrainSettings, paths: Sequence[Path]) -> dict[str, TrainSettings]:
    """The settings of each candidate by its file's name: those of the run, and over them what the file says.

    Args:
        settings: of the run.
        paths: YAML files; without any the run itself is the one candidate, ``model``.

    Raises:
        ValueError: a file does not fit, changes what all candidates share, or two have one name.
    """
    alone = replace(settings, out=None, split=None)
    if not paths:
        return {"model": alone}
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
        found[path.stem] = settings_from(TrainSettings, {**asdict(alone), **changes})
    return found
