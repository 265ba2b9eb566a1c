"""How many processes share the slides of a command that names no devices.

With a small model most of a slide's time goes to decoding, tables and pictures, in Python and on one core. Slides side
by side then use the others: each process is a fork of the command, which has loaded the model (``devices.py``). A large
encoder keeps all cores busy by itself, and would be in memory several times.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from maskattn.cli.free_memory import PROCESS_GIB, devices_that_fit, free_gib

__all__ = ["is_small_model", "processes_for"]

_SLIDES_OF_A_PROCESS = 8  # with fewer, what a fork and its decoding process take is not gained
_MOST_PROCESSES = 8
_SMALL_BYTES = 12 << 20  # three million weights, each multiplied once for every token of a tile
# Devices of CUDA, of CUDA in Windows' subsystem for Linux, and of ROCm. Torch is not asked: once it is imported it may
# start threads, which a fork cannot use.
_GPUS = ("dev/nvidiactl", "dev/dxg", "dev/kfd")


def processes_for(slides: int, root: Path = Path("/")) -> list[str]:
    """Return the devices of the processes, ``["cpu", "cpu"]`` for two; none if one process should run all slides.

    Args:
        slides: the number of slides.
        root: where the system's files are.
    """
    if sys.platform != "linux" or "torch" in sys.modules or any((root / name).exists() for name in _GPUS):
        return []
    count = min(len(os.sched_getaffinity(0)), slides // _SLIDES_OF_A_PROCESS, _MOST_PROCESSES)
    fitting = devices_that_fit(["cpu"] * count, PROCESS_GIB, free_gib(root)) if count > 1 else []
    return fitting if len(fitting) > 1 else []


def is_small_model(path: Path) -> bool:
    """Return whether a path is a slide model with an encoder of its own that is smaller than ViT-Ti/16."""
    from maskattn.nn.slide_models.card import CONFIG, WEIGHTS, card_at

    weights = path / WEIGHTS if path.is_dir() else path
    in_folder = weights.name == WEIGHTS and (weights.parent / CONFIG).is_file()
    if not in_folder and not (weights.suffix == ".safetensors" and weights.with_suffix(".json").is_file()):
        return False  # another tool's, whose card would have to be read by torch
    try:
        card = card_at(path)
        return card is not None and card.kind == "slide_model" and weights.stat().st_size <= _SMALL_BYTES
    except (OSError, ValueError):  # which loading it reports
        return False
