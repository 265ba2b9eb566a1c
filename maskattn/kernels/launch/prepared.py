"""Launches that are made again: past the look-ups with which Triton's launcher finds the compiled kernel every time.

The launcher looks at each argument of each launch: of a tensor it takes the dtype and whether its address is a
multiple of 16, of a number whether it is 1 or a multiple of 16. A launch with the same numbers, and with tensors of the
same dtypes, strides and alignment, gets the same compiled kernel and the same arguments but for the addresses. So the
first one goes through the launcher, and is kept as a template into which later ones put their addresses. Nothing that
is kept holds a tensor.

On NVIDIA alone: for AMD the launcher also looks at the size of a tensor's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskattn.kernels.launch.descriptors import launch

__all__ = ["Launch", "launch_prepared"]

# Templates that are kept; beyond it all are made anew, so that lengths that never come again take no memory.
MOST = 4096


class Launch(NamedTuple):
    """A launch as Triton's launcher is given it; ``described`` as in :func:`launch`."""

    kernel: Any
    programs: int
    described: bool
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


class _Template:
    """The arguments of a launch, to be filled with addresses, and the compiled kernel that takes them."""

    def __init__(self, made: Launch, compiled: Any, tensors: tuple[Tensor | None, ...]) -> None:
        self.programs, self.described, self.compiled = made.programs, made.described, compiled
        self._constants: list[Any] = []
        self._getters: list[Callable[[list[Any]], Any]] = []
        self._positions = {id(x): position for position, x in enumerate(tensors) if x is not None}
        self._count = len(tensors)
        given = dict(zip(made.kernel.arg_names, made.arguments, strict=False)) | dict(made.constants)
        constants: list[Any] = []
        shape = self._shape_of(tuple(given[name] for name in made.kernel.arg_names), constants)
        self._constants = constants
        self._compose(shape, self._count + len(constants))
        del self._positions

    def _shape_of(self, argument: Any, constants: list[Any]) -> Any:
        """The position in the pool of an argument, or a list of those of a tuple's items."""
        if isinstance(argument, Tensor):
            return self._positions[id(argument)]
        if isinstance(argument, tuple) and _has_tensor(argument):
            return [self._shape_of(x, constants) for x in argument]
        constants.append(argument)
        return self._count + len(constants) - 1

    def _compose(self, shape: list[Any], size: int) -> int:
        """Add what makes a tuple of the pool; returns the position of the tuple in the pool, which is its new end."""
        positions = [self._compose(x, size) if isinstance(x, list) else x for x in shape]
        self._getters.append(itemgetter(*positions))
        return size + len(self._getters) - 1

    def arguments(self, addresses: list[int | None]) -> tuple[Any, ...]:
        """The arguments of the kernel with these addresses in place of the tensors."""
        pool = [*addresses, *self._constants]
        for getter in self._getters:
            pool.append(getter(pool))
        return pool[-1]


_TEMPLATES: dict[Hashable, _Template] = {}


def launch_prepared(
    known: tuple[Hashable, ...], tensors: tuple[Tensor | None, ...], make: Callable[[], Launch], q: Tensor
) -> None:
    """Launch a kernel as ``make`` says, or as it said for a launch like this one.

    Args:
        known: every number of the launch's arguments that does not follow from the strides of the tensors.
        tensors: all that the arguments have, None for those that are absent.
        make: called where no such launch was made before.
        q: a tensor of the device.
    """
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    layouts = [
        None if x is None or address is None else (x.dtype, x.stride(), address & 15)
        for x, address in zip(tensors, addresses, strict=True)
    ]
    # Which of them are one tensor given twice, since a template has one place for it.
    identities = [id(x) for x in tensors]
    key = (*known, q.device, *layouts, *map(identities.index, identities))
    template = _TEMPLATES.get(key)
    if template is not None:
        launch(template.compiled, template.programs, template.described, q, *template.arguments(addresses))
        return
    made = make()
    compiled = launch(made.kernel, made.programs, made.described, q, *made.arguments, **made.constants)
    if _can_be_kept(compiled, made.arguments, tensors):
        if len(_TEMPLATES) >= MOST:
            _TEMPLATES.clear()
        _TEMPLATES[key] = _Template(made, compiled, tensors)


def _can_be_kept(compiled: Any, arguments: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether there is a compiled kernel, not in the interpreter, and every tensor of the arguments was given."""
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel) or torch.version.hip is not None:
        return False
    given = {id(x) for x in tensors}
    return all(id(x) in given for x in _leaves(arguments) if isinstance(x, Tensor))


def _leaves(argument: Any) -> list[Any]:
    return [leaf for x in argument for leaf in _leaves(x)] if isinstance(argument, tuple) else [argument]


def _has_tensor(argument: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) for x in _leaves(argument))
