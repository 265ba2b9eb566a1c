"""Lightning without its messages, importable even if the installed torchvision was built for another torch.

Lightning imports torchmetrics, which imports torchvision if it is installed. That import fails if torchvision's
compiled operators do not fit the installed torch (:mod:`maskattn.torchvision_names`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from maskattn.torchvision_names import name_operators

__all__ = ["LightningEnvironment", "pl", "quiet"]


def _names_for_torchvision() -> torch.library.Library | None:
    if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return None
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, OSError, ImportError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return name_operators()
    return None


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of libraries are for developers
    _kept = _names_for_torchvision()  # the names disappear with the library object that defined them
    pl: Any = importlib.import_module("pytorch_lightning")
    LightningEnvironment: Any = importlib.import_module("pytorch_lightning.plugins.environments").LightningEnvironment


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which Lightning logs no advice or announcements; this package reports what users must know."""
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
