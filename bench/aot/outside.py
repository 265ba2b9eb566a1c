"""Every operation in Triton's interpreter, with each read and write checked against the tensors of its launch.

    TRITON_INTERPRET=1 python -m bench.aot.outside --quick
    TRITON_INTERPRET=1 python -m bench.aot.outside
    TRITON_INTERPRET=1 python -m bench.aot.outside --shapes 8 --shard 1/4

A program may access the elements of its kernel's tensors, and no other byte: neither memory before, after or in the
gaps of a view, nor another buffer (all buffers are far apart). This holds for inputs, outputs and scratch memory alike,
and covers the operations with their gradients, schedules and moved rows. The calls are those of ``covering.py``, each
with random shapes of its own, and calls whose tensors spread over more than 2^31 elements.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from bench.aot.covering import covering, in_tf32x3, random_shapes
from bench.aot.every_call import OF_CHUNKS, OPERATIONS, Shape, run
from bench.aot.quick_interpreter import replace_once
from maskattn.attention.impl import triton as triton_impl
from maskattn.kernels.attention import masked

__all__ = ["Elements", "OutsideError", "checked_memory", "main", "rows_moved"]

# Of a random shape, one less; a launch takes time in proportion to its programs.
MOST_SEQUENCES = 8

# Unused elements on each side of a buffer, more than the largest tile of the interpreter's configurations.
ZONE = 1 << 14


class OutsideError(Exception):
    """A program read or wrote memory outside the elements of its kernel's tensors."""


class _CheckedMemory:
    """A replacement of the interpreter's memory that checks every access."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain
        self.kernel, self.allowed = "", Elements(())
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
        found = np.asarray(addresses).ravel()[np.asarray(mask).ravel().astype(bool)].astype(np.int64)
        if found.size == 0:
            return
        self.touched += found.size
        wrong = self.allowed.outside(found)
        if wrong:
            raise OutsideError(f"{self.kernel} {what} {wrong} elements outside its tensors")


def _tensors_in(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, tuple):
        for x in argument:
            yield from _tensors_in(x)


class Elements:
    """The addresses of the elements of some tensors, as runs of adjacent elements of one size."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        runs = defaultdict(list)
        for x in tensors:
            runs[x.element_size()].append(_runs(x))
        self._runs = [(size, *_merged(np.concatenate(of_size))) for size, of_size in runs.items()]

    def outside(self, addresses: Any) -> int:
        """Return how many of the addresses are not those of an element."""
        left = addresses
        for size, starts, ends in self._runs:
            if left.size == 0 or starts.size == 0:
                continue
            at = np.searchsorted(starts, left, side="right") - 1
            inside = (at >= 0) & (left < ends[at]) & ((left - starts[at]) % size == 0)
            left = left[~inside]
        return int(left.size)


def _runs(x: Tensor) -> Any:
    """Return the first address of each run of adjacent elements and the address after it, (runs, 2)."""
    if x.numel() == 0:
        return np.empty((0, 2), np.int64)
    adjacent, axes = 1, [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    while axes and axes[-1][1] == adjacent:
        adjacent *= axes.pop()[0]
    offsets = np.zeros(1, np.int64)
    for size, stride in axes:
        offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
    starts = x.data_ptr() + offsets * x.element_size()
    return np.stack([starts, starts + adjacent * x.element_size()], 1)


def _merged(runs: Any) -> tuple[Any, Any]:
    """Return the starts and ends of runs in order, of which overlapping and adjacent ones are one."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    reached = np.maximum.accumulate(runs[:, 1])
    first = np.append(True, runs[1:, 0] > reached[:-1])[: len(runs)]
    return runs[first, 0], reached[np.append(first[1:], True)[: len(runs)]]


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
        memory.allowed = Elements(tensors)
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
    """Yield (operation, shape, whether kept rows are moved to the front)."""
    if quick:
        first = Shape((3, 0, 21), queries=2, head_width=24, dtype=torch.float32, options=True)
        yield from ((operation, first, moved) for operation in OPERATIONS for moved in _moves(operation))
        return
    each = (
        *covering(list(OPERATIONS)),
        *covering(list(OF_CHUNKS), every=4),
        *in_tf32x3(["packed_attention", "masked_attention"]),
    )
    for case in each:
        for moved in _moves(case.operation):
            shapes = random_shapes(case.kind, case.like, count, f"{case.name}{moved}", MOST_SEQUENCES)
            yield from ((case.operation, shape, moved) for shape in shapes)
    for operation in OPERATIONS | OF_CHUNKS:
        for options in (False, True):
            yield operation, Shape((70, 70), 2, head_width=16, options=options, far_apart=True), False


def _moves(operation: str) -> tuple[bool, ...]:
    return (False, True) if operation.startswith("masked") else (False,)


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape of each operation with every option")
    parser.add_argument("--shapes", type=int, default=2, help="random shapes of each operation and head width")
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
