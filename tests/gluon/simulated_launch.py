"""Run kernels in the simulator: as a launcher would, from their own source, on tensors of the CPU.

``simulating(seed)`` is a context in which every launch of a Triton or Gluon kernel is simulated. A planted fault is a
replacement in the source of one of the functions.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from simulated_language import HOPPER, LANGUAGE, MBARRIER, TMA, add_to_global, loop, program
from simulated_machine import Machine
from simulated_values import Pointer, Value
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.runtime.jit import JITFunction

from maskattn.kernels.gluon import reduction
from maskattn.kernels.launch import replay, support
from maskattn.kernels.tables import lookup

__all__ = ["Plant", "simulating"]

# Name of a function, what stands in its source, what is to stand there instead.
Plant = tuple[str, str, str]

_STAND_INS = {gl: LANGUAGE, tl: LANGUAGE, hopper: HOPPER, mbarrier: MBARRIER, tma: TMA}
_FUNCTIONS = {reduction.add_to_global: add_to_global}


class _Source:
    """The kernels' functions as the simulator runs them."""

    def __init__(self, plants: tuple[Plant, ...]) -> None:
        self.plants = plants
        self.planted: set[str] = set()
        self._globals: dict[int, dict[str, Any]] = {}

    def function(self, kernel: JITFunction) -> Any:
        namespace = self._namespace(kernel.fn.__globals__)
        name = kernel.fn.__name__
        plants = [plant for plant in self.plants if plant[0] == name]
        if not plants:
            return types.FunctionType(kernel.fn.__code__, namespace, name, kernel.fn.__defaults__)
        self.planted.add(name)
        source = textwrap.dedent(inspect.getsource(kernel.fn))
        source = source[source.index("def ") :]
        for _, before, after in plants:
            if before not in source:
                raise LookupError(f"{name} has no {before!r}")
            source = source.replace(before, after)
        made: dict[str, Any] = {}
        header = "from __future__ import annotations\n"
        exec(compile(header + source, f"<{name} with a fault>", "exec"), namespace, made)
        return made[name]

    def _namespace(self, module: dict[str, Any]) -> dict[str, Any]:
        if id(module) not in self._globals:
            made = self._globals[id(module)] = {"range": loop}
            for name, x in module.items():
                made.setdefault(name, self._stand_in(x))
        return self._globals[id(module)]

    def _stand_in(self, x: Any) -> Any:
        if isinstance(x, JITFunction):
            return lambda *args, **kwargs: self.function(x)(*args, **kwargs)
        if isinstance(x, tl.constexpr):
            return x.value
        if isinstance(x, types.FunctionType):
            return _FUNCTIONS.get(x, x)
        return _STAND_INS[x] if isinstance(x, types.ModuleType) and x in _STAND_INS else x


@contextlib.contextmanager
def simulating(seed: int = 0, *plants: Plant) -> Iterator[None]:
    """Simulate every launch as one on Hopper.

    Args:
        seed: who goes first where several may, and how late copies come.
        plants: faults.
    """
    source = _Source(plants)

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | constants
        arguments = {name: _argument(kernel, name, given[name]) for name in kernel.arg_names if name in given}
        for number in range(grid[0]):
            machine = Machine(seed * 1009 + number)
            with program(machine, number, grid[0]):
                source.function(kernel)(**arguments)
                machine.end()

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.object(lookup, "target_of", return_value="sm90"))
        patches.enter_context(mock.patch.object(support, "_missing_on", return_value=None))
        # There is no launcher whose calls could be replayed.
        patches.enter_context(mock.patch.object(replay, "_IS_POSSIBLE", False))
        yield
    if source.planted != {name for name, _, _ in plants}:
        raise LookupError("a function with a planted fault was not run")


def _argument(kernel: JITFunction, name: str, x: Any) -> Any:
    """As the launcher hands it to a program."""
    if kernel.params[kernel.arg_names.index(name)].is_constexpr:
        return x.value if isinstance(x, tl.constexpr) else x
    varies = not kernel.params[kernel.arg_names.index(name)].do_not_specialize
    return _leaf(x, varies)


def _leaf(x: Any, specialised: bool) -> Any:
    if isinstance(x, tuple):
        leaves = [_leaf(each, specialised) for each in x]
        return type(x)(*leaves) if hasattr(x, "_fields") else tuple(leaves)
    if isinstance(x, Tensor):
        return Pointer.of(x)
    if isinstance(x, tl.constexpr):
        return x.value
    if isinstance(x, float):
        return Value(torch.tensor(x, dtype=torch.float32))
    if isinstance(x, int) and not isinstance(x, bool):
        # The launcher makes constants of numbers that are 1.
        return x if specialised and x == 1 else Value(torch.tensor(x, dtype=torch.int32 if x < 2**31 else torch.int64))
    return x


assert not triton.knobs.runtime.interpret, "the simulator takes kernels, not what the interpreter makes of them"
