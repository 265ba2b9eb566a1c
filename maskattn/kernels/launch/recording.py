"""The recording of a pass: which memory it allocates, and which kernels it launches with which tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # it imports this module
    from maskattn.kernels.launch.prepared import Template

__all__ = ["Recording", "allocate", "note_constant", "note_launch", "recorded"]


class Recording:
    """What a pass has done so far.

    Attributes:
        made: the tensors that the pass has allocated by :func:`allocate`.
        fills: what each of them was filled with before the launches, None for nothing.
        constants: tensors that every pass over the same sequences reads at the same address.
        launches: for each launch its template and tensors; the template is None if the launch cannot be repeated.
    """

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.fills: list[float | None] = []
        self.constants: list[Tensor] = []
        self.launches: list[tuple[Template | None, tuple[Tensor | None, ...]]] = []


class _Thread(threading.local):
    """The recording of each thread."""

    recording: Recording | None = None


_THREAD = _Thread()


@contextmanager
def recorded() -> Iterator[Recording]:
    """Record what the calls inside do."""
    before, recording = _THREAD.recording, Recording()
    _THREAD.recording = recording
    try:
        yield recording
    finally:
        _THREAD.recording = before


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fill: float | None = None) -> Tensor:
    """Return a tensor that is filled with ``fill``, or uninitialised."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if fill is not None:
        made.fill_(fill)
    if _THREAD.recording is not None:
        _THREAD.recording.made.append(made)
        _THREAD.recording.fills.append(fill)
    return made


def note_constant(x: Tensor) -> None:
    """Record a tensor that every pass over the same sequences reads, such as the order of their tiles."""
    if _THREAD.recording is not None:
        _THREAD.recording.constants.append(x)


def note_launch(template: Template | None, tensors: tuple[Tensor | None, ...]) -> None:
    """Record a launch."""
    if _THREAD.recording is not None:
        _THREAD.recording.launches.append((template, tensors))
