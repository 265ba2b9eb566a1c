"""The state of a training on disk, written atomically after every epoch, so that it can be killed at any time."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from maskattn.errors import OutputError
from maskattn.files import replacing
from maskattn.training.lightning import pl

__all__ = ["AtomicCheckpoints", "read_state", "write_state"]


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state atomically: a file with its name is always complete.

    Raises:
        OutputError: the disk is full, or the folder cannot be written; the earlier state is kept.
    """
    held = io.BytesIO()
    torch.save(state, held)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(held.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kept = "the state of the previous epoch is kept" if path.exists() else "there is no earlier state"
        raise OutputError(
            f"the state of a training must be written completely, got {path} of {held.getbuffer().nbytes / 1e6:.1f} "
            f"MB: {error.strerror or error}; {kept}: free space, and run the same command again to resume"
        ) from error


def read_state(path: Path) -> dict[str, Any] | None:
    """Read what :func:`write_state` wrote, to the CPU, without running code in it; None if there is no file.

    Raises:
        ValueError: the file is not a complete state.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"the state of a training must be complete, got {path}: {' '.join(str(error).split())[:200]}; remove it to "
            "start over"
        ) from error
    return state


class AtomicCheckpoints(pl.plugins.io.CheckpointIO):
    """Lightning's writing and reading of states, by :func:`write_state` and :func:`read_state`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a state."""
        write_state(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a state."""
        state = read_state(Path(path))
        if state is None:
            raise FileNotFoundError(f"there is no state of a training at {path}")
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a state."""
        Path(path).unlink(missing_ok=True)
