"""Every operation in Triton's interpreter, with each read and write checked against the tensors of its launch.

    TRITON_INTERPRET=1 python -m bench.aot.outside --quick
    TRITON_INTERPRET=1 python -m bench.aot.outside --shapes 8
    TRITON_INTERPRET=1 python -m bench.aot.outside --shapes 8 --shard 1/4

A program may access the elements of its kernel's tensors, and no other byte: neither memory before, after or in the
gaps of a view, nor another buffer (all buffers are far apart). This holds for inputs, outputs and scratch memory alike,
and covers the operations with their gradients, schedules and moved rows. The shapes are those of the dry run.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from bench.aot.dry_run import DTYPES, shapes_like
from bench.aot.every_call import OPERATIONS, Shape, run
from bench.aot.quick_interpreter import replace_once
from maskattn.attention.impl import triton as triton_impl
from maskattn.kernels.attention import masked

__all__ = ["OutsideError", "checked_memory", "main", "rows_moved"]

# Unused elements on each side of a buffer, more than the largest tile of the interpreter's configurations.
ZONE = 1 << 14


class OutsideError(Exception):
    """A program read or wrote memory outside the elements of its kernel's tensors."""


class _CheckedMemory:
    """A replacement of the interpreter's memory that checks every access."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain
        self.kernel, self.allowed = "", np.empty(0, np.uint64)
        self.touched, self.kernels = 0, set[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check(addresses, mask, "reads")
        return self._plain.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, values: Any, mask: Any) -> Any:
        self._check(addresses, mask, "writes")
        return self._plain.store(addresses, values, mask)

    def atomic_rmw(self, operation: Any, addresses: Any, values: Any, mask: Any, order: Any) -> Any:
        self._check(addresses, mask, "writes")
        return self._plain.atomic_rmw(operation, addresses, values, mask, order)

    def _check(self, addresses: Any, mask: Any, what: str) -> None:
        found = np.asarray(addresses).ravel()[np.asarray(mask).ravel().astype(bool)].astype(np.uint64)
        if found.size == 0:
            return
        self.touched += found.size
        at = np.minimum(np.searchsorted(self.allowed, found), max(self.allowed.size - 1, 0))
        if self.allowed.size == 0 or (self.allowed[at] != found).any():
            wrong = found if self.allowed.size == 0 else found[self.allowed[at] != found]
            raise OutsideError(f"{self.kernel} {what} {wrong.size} elements outside its tensors")


def _tensors_in(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, tuple):
        for x in argument:
            yield from _tensors_in(x)


def _elements(x: Tensor) -> Any:
    """Return the address of each element."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
    return (x.data_ptr() + offsets * x.element_size()).astype(np.uint64)


def _apart(allocate: Callable[..., Tensor], empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function of torch so that its result is in the middle of a larger, separate buffer."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        if type(x) is not Tensor or x.numel() == 0 or x.device.type != "cpu" or not x.is_contiguous():
            return x
        buffer = empty(x.numel() + 2 * ZONE, dtype=x.dtype)
        inside = buffer[ZONE : ZONE + x.numel()].view(x.shape)
        with torch.no_grad():
            inside.copy_(x)
        return inside.requires_grad_(x.requires_grad)

    return call


@contextmanager
def checked_memory() -> Iterator[_CheckedMemory]:
    """Let launches that access memory outside their tensors raise :class:`OutsideError`, wrapped by the interpreter."""
    memory = _CheckedMemory(interpreter._interpreter)
    launch = interpreter.GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory.kernels.add(self.fn.__name__)
        tensors = [*_tensors_in(args), *_tensors_in(tuple(kwargs.values()))]
        memory.kernel = self.fn.__name__
        memory.allowed = np.unique(np.concatenate([np.empty(0, np.uint64), *(_elements(x) for x in tensors)]))
        return launch(self, *args, **kwargs)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(interpreter, "_interpreter", memory))
        patches.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", checked))
        for name in ("empty", "zeros", "full", "empty_like", "zeros_like", "tensor", "arange"):
            patches.enter_context(mock.patch.object(torch, name, _apart(getattr(torch, name), torch.empty)))
        yield memory


@contextmanager
def rows_moved() -> Iterator[None]:
    """Let kept rows of dense tensors be moved to the front, however few they are."""
    with ExitStack() as patches:
        for home, name in ((masked, "masked_forward"), (triton_impl, "masked_backward")):
            moving = functools.partial(getattr(home, name), moved_from=0)
            patches.enter_context(mock.patch.object(home, name, moving))
        yield


def cases(quick: bool, count: int) -> Iterator[tuple[str, Shape, bool]]:
    """Yield (operation, shape, whether kept rows are moved to the front), the small widths first."""
    for width in (24,) if quick else (16, 24, 48, 72, 80):
        for dtype in (torch.float32,) if quick else DTYPES.values():
            for options in (True,) if quick else (False, True):
                for operation in OPERATIONS:
                    first = Shape((50,), head_width=width, dtype=dtype, options=options)
                    shapes = [replace(first, lengths=(3, 0, 21), queries=2)] if quick else [first]
                    for shape in [*shapes, *(() if quick else shapes_like(first, count))]:
                        yield operation, shape, False
                        if operation.startswith("masked"):
                            yield operation, shape, True


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape of each operation with every option")
    parser.add_argument("--shapes", type=int, default=4, help="random shapes of each operation, width and dtype")
    parser.add_argument("--cases", default="", help="run only operations whose names contain this")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th call from the I-th")
    given = parser.parse_args(arguments)
    if not triton.knobs.runtime.interpret:
        parser.error("set TRITON_INTERPRET=1 before Python starts")
    replace_once()
    failed = done = 0
    began = time.process_time()
    first, step = (int(x) for x in given.shard.split("/"))
    chosen = [case for case in cases(given.quick, given.shapes) if given.cases in case[0]]
    for operation, shape, moved in chosen[first::step]:
        with checked_memory() as memory, rows_moved() if moved else nullcontext():
            try:
                run(operation, shape)
                wrong = "" if memory.touched else "nothing was touched"
            except Exception as error:  # the remaining cases are informative, too
                wrong = f"{type(error).__name__}: {error}"
        done, failed = done + 1, failed + bool(wrong)
        if wrong:
            print(f"FAILED {operation}, {shape}: {wrong}", flush=True)
    print(f"{done} calls, {failed} failed, {time.process_time() - began:.0f} s of processor time")
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
