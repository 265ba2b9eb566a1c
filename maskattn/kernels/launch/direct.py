"""Launches of a compiled kernel by the C function of Triton's launcher, without the Python code around it.

For every launch Triton's launcher asks for device and stream, prepares what hooks may read, and allocates memory for
descriptors by a function that the caller sets. Here the caller gives device and stream, and memory is allocated where
it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["Place", "hooked", "launcher_of", "place_of"]

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


def launcher_of(compiled: Any, programs: int) -> Callable[[Place, Tensor, tuple[Any, ...]], None] | None:
    """Return a function of the place, a tensor on the device and the kernel's arguments that launches the kernel.

    The place must be that of the tensor. None if the launcher of the installed Triton has another form; that of 3.7 is
    known.
    """
    run = compiled.run
    try:
        launch, annotations, signature = run.launch, run.arg_annotations, run.kernel_signature
        flags = run.launch_cooperative_grid, run.launch_pdl
        scratch_bytes = programs * run.num_ctas * run.global_scratch_size
        of_profiler = run.profile_scratch_size
    except AttributeError:
        return None
    if of_profiler:
        return None
    function, metadata, grid = compiled.function, compiled.packed_metadata, (programs, 1, 1)

    def on_device(stream: int, q: Tensor, arguments: tuple[Any, ...]) -> None:
        memory = torch.empty(scratch_bytes, dtype=torch.int8, device=q.device) if scratch_bytes else None
        scratch = None if memory is None else memory.data_ptr()
        launch(
            *grid, stream, function, *flags, metadata, None, None, None, scratch, None, annotations, signature,
            arguments,
        )  # fmt: skip

    def call(place: Place, q: Tensor, arguments: tuple[Any, ...]) -> None:
        index, stream = place
        if index < 0 or index == triton.runtime.driver.active.get_current_device():
            on_device(stream, q, arguments)
        else:
            with torch.cuda.device_of(q):
                on_device(stream, q, arguments)

    return call
