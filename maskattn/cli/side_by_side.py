"""How many processes share the slides of a command that names no devices.

Opening a slide, finding its tissue, and writing tables and pictures run on one core, in Python for the most part.
Slides side by side use the others meanwhile: each process is a fork of the command, which has loaded the model
(``devices.py``). A large encoder takes so long for a slide that this does not show, and would be in memory several
times.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maskattn.cli.free_memory import PROCESS_GIB, devices_that_fit, free_gib

__all__ = ["gib_with_encoder", "is_small_model", "processes_for"]

# With fewer, what a fork and its decoding process take is not gained, and one's last slide keeps the others waiting.
_SLIDES_OF_A_PROCESS = 8
_MOST_PROCESSES = 8
_SMALL_BYTES = 12 << 20  # three million weights, each multiplied once for every token of a tile
_MOST_ENCODER_BYTES = 160 << 20  # ViT-S/16 in float32 has 88 MB; with ViT-B/16's 344 next to nothing is gained
_TIMES_IN_MEMORY = 4  # weights, packed ones, and room for a large slide
# Devices of CUDA, of CUDA in Windows' subsystem for Linux, and of ROCm. Torch is not asked: once it is imported it may
# start threads, which a fork cannot use.
_GPUS = ("dev/nvidiactl", "dev/dxg", "dev/kfd")


def processes_for(sizes: Sequence[int], process_gib: float = PROCESS_GIB, root: Path = Path("/")) -> list[str]:
    """Return the devices of the processes, ``["cpu", "cpu"]`` for two; none if one process should run all slides.

    Args:
        sizes: the bytes of each slide's files; 0 if there are none, of which its run will tell.
        process_gib: memory that a process takes in GiB.
        root: where the system's files are.
    """
    if sys.platform != "linux" or "torch" in sys.modules or any((root / name).exists() for name in _GPUS):
        return []
    sizes = [max(1, size) for size in sizes]
    as_large = sum(sizes) // max(sizes, default=1)  # so many slides like the largest are as large as all together
    count = min(len(os.sched_getaffinity(0)), as_large // _SLIDES_OF_A_PROCESS, _MOST_PROCESSES)
    fitting = devices_that_fit(["cpu"] * count, process_gib, free_gib(root)) if count > 1 else []
    return fitting if len(fitting) > 1 else []


def gib_with_encoder(encoder: str, weights: Path | None) -> float | None:
    """Return what a process with an encoder takes, in GiB; None if one process should run all slides.

    That is so if the encoder is large, still to be fetched, or a folder: the library that loads it may start threads.

    Args:
        encoder: the name, file or folder of the encoder.
        weights: the file of its weights, or None.
    """
    path = Path(encoder) if weights is None else weights
    try:
        size = path.stat().st_size if path.is_file() else 0
    except OSError:
        return None
    return PROCESS_GIB + _TIMES_IN_MEMORY * size / 2**30 if 0 < size <= _MOST_ENCODER_BYTES else None


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
