"""The folder of a run: checks of its configuration and data, and the message for a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from maskattn.errors import OutputError, quoted
from maskattn.files import replacing
from maskattn.slide.asked import asked_of
from maskattn.training.fit_settings import FitSettings
from maskattn.training.run_config import RUN_CONFIG, plain_values, read_config, settings_from, write_config

__all__ = ["check_run", "full_disk_in_words", "note_data", "place_of_process"]

_DATA = "data.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_run(out: Path, settings: Any) -> None:
    """Check that a folder has no run of another configuration.

    Raises:
        ValueError: it has one (the error names the differences), or a model that does not belong to a run.
    """
    if not (out / RUN_CONFIG).is_file():
        if (out / "config.json").is_file():
            raise ValueError(
                f"--out must be empty or the folder of this run, got {out}, which has a model and no {RUN_CONFIG}; "
                "name another"
            )
        return
    kind = type(settings)
    earlier = plain_values(settings_from(kind, read_config(out / RUN_CONFIG, kind)))
    now = plain_values(settings)
    # Paths may change, because the contents of the files are compared separately.
    compared = [one.name for one in fields(kind) if asked_of(one).serves is not None and "Path" not in str(one.type)]
    unlike = [f"{name} {earlier[name]} instead of {now[name]}" for name in compared if earlier[name] != now[name]]
    if unlike:
        raise ValueError(
            f"a run is resumed with its own configuration, got {'; '.join(unlike)} in {out}; use the same one "
            f"(--config {quoted(out / RUN_CONFIG)}), or name another --out"
        )


def note_data(out: Path, settings: Any, sha256: str) -> None:
    """Write the configuration, and write the digest of the data or compare it with the stored one.

    Raises:
        ValueError: the run was started with other data.
        OSError: a file cannot be written.
    """
    path = out / "state" / _DATA
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in (out, path.parent):
        for leftover in folder.glob(".*.partial"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8"))["sha256"] != sha256:
            raise ValueError(
                f"a run is resumed with its own data, got slides, labels or parts that differ from those of {out}; "
                "give the same, or name another --out"
            )
    else:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"sha256": sha256}) + "\n", encoding="utf-8")
    write_config(out / RUN_CONFIG, settings)


@contextlib.contextmanager
def full_disk_in_words(out: Path) -> Iterator[None]:
    """A context that turns the error of a full disk into a sentence with the remedy."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OutputError(
            f"a run needs space for its files, got {error.strerror} in {out}; complete files are kept: free space, and "
            "run the same command again to resume"
        ) from error


def place_of_process(settings: FitSettings) -> tuple[int, int]:
    """Return the index of this process among those that train together, and their number."""
    # Lightning starts the other processes, and sets their LOCAL_RANK.
    return int(os.environ.get("LOCAL_RANK", "0")) if settings.devices > 1 else 0, settings.devices
