"""Removal of the fleet's files by the last process, except those of a process that has just joined."""

from __future__ import annotations

import shutil
from pathlib import Path

from maskattn.slide.fleet.claims import owner_of
from maskattn.slide.fleet.ended import ENDED_FOLDERS
from maskattn.slide.fleet.members import Watch, members_of

__all__ = ["put_away"]


def put_away(root: Path, token: str, watch: Watch) -> None:
    """Remove the files of members that have ended, the marks of ended slides, and the lists of slides.

    Args:
        root: the fleet's folder.
        token: the token of this process, which is about to leave.
        watch: knows which members have ended.
    """
    for claim in _files(root / "claims"):
        owner = owner_of(claim)
        if owner == token or (owner and watch.has_ended(owner)):
            claim.unlink(missing_ok=True)
    for member in list(members_of(root / "members")):
        if member != token and watch.has_ended(member):
            (root / "members" / f"{member}.json").unlink(missing_ok=True)
    for marks in root.glob(f"{ENDED_FOLDERS}*"):
        shutil.rmtree(marks, ignore_errors=True)
    for slides in root.glob("slides-*.txt"):
        slides.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
