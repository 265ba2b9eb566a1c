"""Repeated launches, which skip the look-ups by which Triton's launcher finds the compiled kernel every time.

The launcher inspects each argument of each launch: the dtype of a tensor and whether its address is a multiple of 16,
and whether a number is 1 or a multiple of 16. Launches with the same numbers, and with tensors of the same dtypes,
strides and alignment, use the same compiled kernel and the same arguments except for the addresses. The first of them
goes through the launcher and is kept as a template, in which later ones replace the addresses. Templates hold no
tensors.

This is done only on NVIDIA GPUs, because for AMD the launcher also inspects the size of a tensor's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskattn.kernels.launch.descriptors import launch
from maskattn.kernels.launch.direct import Place, direct_launch, hooked, on_device_of, place_of
from maskattn.kernels.launch.recording import note_launch

__all__ = ["Launch", "Template", "launch_prepared"]

# Largest number of templates; beyond it all are discarded, so that lengths that never recur take no memory.
MOST = 4096


class Launch(NamedTuple):
    """A launch in the form that Triton's launcher takes; ``described`` as in :func:`launch`."""

    kernel: Any
    programs: int
    described: bool
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


class Template:
    """A compiled kernel and the arguments of its launch, in which addresses are replaced.

    Attributes:
        direct: the launch without Triton's Python code; None if that is not possible.
        numbers: the arguments of the direct launch that are no tensors.
        run_time: the position of each argument of the direct launch among the tensors, followed by the numbers.
    """

    def __init__(self, made: Launch, compiled: Any, tensors: tuple[Tensor | None, ...]) -> None:
        self._made_of = made.programs, made.described, compiled
        self._count, positions = len(tensors), {id(x): position for position, x in enumerate(tensors) if x is not None}
        given = dict(zip(made.kernel.arg_names, made.arguments, strict=False)) | dict(made.constants)
        arguments = tuple(given[name] for name in made.kernel.arg_names)
        self.direct, self.numbers = direct_launch(compiled, made.programs), list[Any]()
        leaves = [] if self.direct is None else self.direct.run_time(arguments)
        self.run_time = [self._position(x, positions, self.numbers) for x in leaves]
        self._run_time_of = itemgetter(*self.run_time) if len(leaves) > 1 else tuple
        self._constants: list[Any] = []
        self._getters: list[Callable[[list[Any]], Any]] = []
        self._compose(self._shape_of(arguments, positions), self._count + len(self._constants))

    def _shape_of(self, argument: Any, positions: Mapping[int, int]) -> Any:
        """Return the position of an argument in the pool, or a list of those of a tuple's items."""
        if isinstance(argument, tuple) and _has_tensor(argument):
            return [self._shape_of(x, positions) for x in argument]
        return self._position(argument, positions, self._constants)

    def _position(self, x: Any, positions: Mapping[int, int], others: list[Any]) -> int:
        """Return the position of a tensor, or of another argument, which is added to the others, after the tensors."""
        if isinstance(x, Tensor):
            return positions[id(x)]
        others.append(x)
        return self._count + len(others) - 1

    def _compose(self, shape: list[Any], size: int) -> int:
        """Add the getter that builds a tuple from the pool; return the tuple's position, the new end of the pool."""
        positions = [self._compose(x, size) if isinstance(x, list) else x for x in shape]
        self._getters.append(itemgetter(*positions))
        return size + len(self._getters) - 1

    def launch(self, place: Place, q: Tensor, addresses: Sequence[int | None]) -> None:
        """Launch the kernel on q's device, at this place, with these addresses in place of the tensors."""
        if self.direct is None or hooked():
            programs, described, compiled = self._made_of
            launch(compiled, programs, described, q, *self.arguments(addresses))
        else:
            with on_device_of(q, place):
                self.direct(place[1], q, self._run_time_of([*addresses, *self.numbers]))

    def arguments(self, addresses: Sequence[int | None]) -> tuple[Any, ...]:
        """Return the arguments of the kernel with these addresses in place of the tensors."""
        pool = [*addresses, *self._constants]
        for getter in self._getters:
            pool.append(getter(pool))
        return pool[-1]


_TEMPLATES: dict[Hashable, Template] = {}


def launch_prepared(
    known: tuple[Hashable, ...],
    tensors: tuple[Tensor | None, ...],
    make: Callable[[], Launch],
    q: Tensor,
    of_lengths: bool = False,
) -> None:
    """Launch a kernel with the arguments of ``make``, or from the template of an equal earlier launch.

    Args:
        known: every number in the arguments that does not follow from the strides of the tensors.
        tensors: all tensors in the arguments, None for absent ones.
        make: returns the launch; called if there is no template for it.
        q: a tensor on the device.
        of_lengths: whether it computes values that are cached with the lengths of the sequences, so that no pass with
            the same lengths has to repeat it.
    """
    template = _launch(known, tensors, make, q)
    if not of_lengths:
        note_launch(template, tensors)


def _launch(
    known: tuple[Hashable, ...], tensors: tuple[Tensor | None, ...], make: Callable[[], Launch], q: Tensor
) -> Template | None:
    """Launch a kernel and return the template, None if there can be none."""
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    layouts = [
        None if x is None or address is None else (x.dtype, x.stride(), address & 15)
        for x, address in zip(tensors, addresses, strict=True)
    ]
    # The key includes which tensors are identical, since a template has only one position for them.
    identities = [id(x) for x in tensors]
    key = (*known, q.device, *layouts, *map(identities.index, identities))
    template = _TEMPLATES.get(key)
    if template is not None:
        template.launch(place_of(q), q, addresses)
        return template
    made = make()
    compiled = launch(made.kernel, made.programs, made.described, q, *made.arguments, **made.constants)
    if not _can_be_kept(compiled, made.arguments, tensors):
        return None
    if len(_TEMPLATES) >= MOST:
        _TEMPLATES.clear()
    template = _TEMPLATES[key] = Template(made, compiled, tensors)
    return template


def _can_be_kept(compiled: Any, arguments: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether a kernel was compiled (the interpreter compiles none) and every tensor argument was listed."""
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel) or torch.version.hip is not None:
        return False
    given = {id(x) for x in tensors}
    return all(id(x) in given for x in _leaves(arguments) if isinstance(x, Tensor))


def _leaves(argument: Any) -> list[Any]:
    return [leaf for x in argument for leaf in _leaves(x)] if isinstance(argument, tuple) else [argument]


def _has_tensor(argument: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) for x in _leaves(argument))
