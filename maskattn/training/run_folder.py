"""The folder of a run: which configuration and which data it is of, and what becomes of it on a full disk."""

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
    """Make sure that a folder has no run of another configuration.

    Raises:
        ValueError: it has one, or a model that is no run's; what differs is named.
    """
    if not (out / RUN_CONFIG).is_file():
        if (out / "config.json").is_file():
            raise ValueError(
                f"--out must be a folder of a run of its own, got {out}, which has a model and no {RUN_CONFIG}; name "
                "another"
            )
        return
    kind = type(settings)
    earlier = plain_values(settings_from(kind, read_config(out / RUN_CONFIG, kind)))
    now = plain_values(settings)
    # Where files lie may change: what they hold is compared by itself.
    compared = [one.name for one in fields(kind) if asked_of(one).serves is not None and "Path" not in str(one.type)]
    unlike = [f"{name} {earlier[name]} instead of {now[name]}" for name in compared if earlier[name] != now[name]]
    if unlike:
        raise ValueError(
            f"a run goes on with the configuration that it began with, got {'; '.join(unlike)} in {out}; ask for the "
            f"same again (--config {quoted(out / RUN_CONFIG)}), or name another --out"
        )


def note_data(out: Path, settings: Any, sha256: str) -> None:
    """Write the configuration and the digest of the data beside the run, or compare them with what is there.

    Raises:
        ValueError: the run began with other data.
        OSError: they cannot be written.
    """
    path = out / "state" / _DATA
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in (out, path.parent):
        for leftover in folder.glob(".*.partial"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8"))["sha256"] != sha256:
            raise ValueError(
                f"a run goes on with the data that it began with, got other slides, labels or parts than {out} was "
                "begun with; give the same, or name another --out"
            )
    else:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"sha256": sha256}) + "\n", encoding="utf-8")
    write_config(out / RUN_CONFIG, settings)


@contextlib.contextmanager
def full_disk_in_words(out: Path) -> Iterator[None]:
    """Within, an error of a full disk becomes a sentence that says what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OutputError(
            f"a run must have room for its files, got {error.strerror} in {out}; what was written whole is kept: make "
            "room, and run the same command again to go on"
        ) from error


def place_of_process(settings: FitSettings) -> tuple[int, int]:
    """Which of the processes that train together this is, and how many there are."""
    # Lightning starts the others, and tells each its number.
    return int(os.environ.get("LOCAL_RANK", "0")) if settings.devices > 1 else 0, settings.devices
