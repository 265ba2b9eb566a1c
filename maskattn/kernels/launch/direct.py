"""Launches of a compiled kernel by the C function of Triton's launcher, without the Python code around it.

For every launch Triton's launcher asks for device and stream, prepares what hooks may read, allocates memory for
descriptors by a function that the caller sets, and takes nested arguments apart, most of which were compiled into the
kernel. Here the caller gives device and stream and the arguments that are left, and memory is allocated where it is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["DirectLaunch", "Place", "direct_launch", "hooked", "on_device_of", "place_of"]

_AS_IT_IS = nullcontext()

# Index of the device, −1 for the CPU, and the raw stream.
Place = tuple[int, int]


def place_of(x: Tensor) -> Place:
    """Return the device of a tensor and the current stream of this device."""
    index, active = x.get_device(), triton.runtime.driver.active
    return index, active.get_current_stream(active.get_current_device() if index < 0 else index)


def hooked() -> bool:
    """Return whether Triton calls functions of others with each launch, as its profiler asks it to."""
    knobs = triton.knobs.runtime
    return any(
        hook is not None and getattr(hook, "calls", True) for hook in (knobs.launch_enter_hook, knobs.launch_exit_hook)
    )


def on_device_of(x: Tensor, place: Place) -> AbstractContextManager[Any]:
    """Make the device of a tensor, whose place is given, the current one if it is not."""
    elsewhere = place[0] >= 0 and place[0] != triton.runtime.driver.active.get_current_device()
    return torch.cuda.device_of(x) if elsewhere else _AS_IT_IS


class DirectLaunch:
    """A launch of a compiled kernel with a number of programs.

    Attributes:
        scratch_bytes: size of the memory for descriptors.

    Raises:
        AttributeError: the launcher of the installed Triton has another form; that of 3.7 is known.
    """

    def __init__(self, compiled: Any, programs: int) -> None:
        run = compiled.run
        self._launch, self.scratch_bytes = run.launch, programs * run.num_ctas * run.global_scratch_size
        self._types = tuple(compiled.src.signature.values())
        if run.profile_scratch_size or len(_run_time(self._types, self._types)) != len(run.kernel_signature):
            raise AttributeError("a launcher that is not known")
        annotation = type(run.arg_annotations[0])
        annotations = [annotation(nested_tuple=None, type=_ARGUMENT) for _ in run.kernel_signature]
        flags = run.launch_cooperative_grid, run.launch_pdl
        self._grid, self._function = (programs, 1, 1), compiled.function
        self._before = *flags, compiled.packed_metadata, None, None, None
        self._after = None, annotations, run.kernel_signature

    def run_time(self, arguments: Sequence[Any]) -> list[Any]:
        """Return those of the nested arguments that are passed at run time, in one list."""
        return _run_time(self._types, arguments)

    def __call__(self, stream: int, q: Tensor, arguments: tuple[Any, ...]) -> None:
        """Launch the kernel on the current device, which is q's, with arguments as :meth:`run_time` lists them."""
        scratch = None
        if self.scratch_bytes:
            scratch = torch.empty(self.scratch_bytes, dtype=torch.int8, device=q.device)
        self.launch(stream, arguments, None if scratch is None else scratch.data_ptr())

    def launch(self, stream: int, arguments: tuple[Any, ...], scratch: int | None) -> None:
        """Launch the kernel with memory for its descriptors at the address ``scratch``, None if it needs none."""
        self._launch(*self._grid, stream, self._function, *self._before, scratch, *self._after, arguments)


# Of Triton's kinds of arguments, that of one which is passed to the kernel.
_ARGUMENT = 1


def _run_time(types: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for kind, argument in zip(types, arguments, strict=True):
        if isinstance(kind, tuple):
            found += _run_time(kind, argument)
        elif kind != "constexpr":
            found.append(argument)
    return found


def direct_launch(compiled: Any, programs: int) -> DirectLaunch | None:
    """Return the launch of a compiled kernel; None if Triton's launcher has another form."""
    try:
        return DirectLaunch(compiled, programs)
    except AttributeError:
        return None
