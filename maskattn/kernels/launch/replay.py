"""Passes over the same sequences, layer after layer: the first is recorded, and the others repeat its launches.

Two passes over sequences of the same lengths, or over the tokens of the same mask, with tensors of the same layouts and
with the same numbers, allocate the same memory and launch the same kernels; only the addresses differ. The first one is
recorded, as a plan that is kept with the lengths or the mask (``maskattn.derived``). The others allocate, put the
addresses into the arguments and launch, and look nothing up in between.

A plan knows a tensor of a launch as an input of the pass, as memory that the pass allocates by ``allocate``, or as one
that is kept with the lengths or the mask. A pass that launches a kernel with any other tensor, such as a copy of an
input whose rows are not contiguous, has no plan and takes the ordinary way every time. A pass that is replayed must
therefore do all its work in launches: what torch's own functions write in place would not be repeated, except for the
values with which ``allocate`` fills results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor

from maskattn.derived import derived
from maskattn.kernels.launch.direct import DirectLaunch, Place, hooked, on_device_of, place_of
from maskattn.kernels.launch.prepared import Template
from maskattn.kernels.launch.recording import Recording, recorded
from maskattn.operands import Mask, Sequences
from maskattn.options import Options

__all__ = ["Plan", "replayed"]

Tensors = tuple[Tensor | None, ...]
# The results are tuples of other types, too, if some results are never None.
Where = Sequences | Mask
Pass = Callable[[tuple[Any, ...], Any, Options], tuple[Any, ...]]

_TENSORS = tuple(x.name for x in fields(Options) if "Tensor" in str(x.type))
_NUMBERS = tuple(x.name for x in fields(Options) if x.name not in _TENSORS)
_tensors_of = itemgetter(*_TENSORS)
_numbers_of = itemgetter(*_NUMBERS)
_NO_TENSORS = (None,) * len(_TENSORS)
# Of memory that torch allocates on a GPU.
_ALIGNMENT = 512

# Kernels are interpreted or compiled from their definition on. For AMD Triton's launcher inspects the tensors' sizes.
_IS_POSSIBLE = torch.version.hip is None and not triton.knobs.runtime.interpret


def replayed(compute: Pass, tensors: tuple[Any, ...], where: Where, options: Options) -> tuple[Any, ...]:
    """Return ``compute(tensors, where, options)``, which is recorded or, if possible, replayed.

    Args:
        compute: a pass; its results are tensors that it allocates by ``allocate``, or None.
        tensors: its tensors, those of the queries first, None for absent ones.
        where: the boundaries of the sequences, or the mask.
        options: the options.
    """
    if not _IS_POSSIBLE:
        return compute(tensors, where, options)
    of_keys: dict[Any, Any] | None
    if isinstance(where, Sequences):
        kept = derived(where.cu_seqlens_q)
        of_keys = kept if where.cu_seqlens_k is where.cu_seqlens_q else derived(where.cu_seqlens_k)
        numbers: tuple[Any, ...] = where.max_seqlen_q, where.max_seqlen_k, id(of_keys)
    else:
        kept = of_keys = derived(where.keep)
        numbers = (where.skip_queries,)
    if kept is None or of_keys is None:
        return compute(tensors, where, options)
    given = vars(options)
    of_options = _tensors_of(given)
    inputs = tensors if of_options.count(None) == len(of_options) else (*tensors, *of_options)
    addresses = [None if x is None else x.data_ptr() for x in inputs]
    place = place_of(tensors[0])
    key = (
        compute, place, *numbers, *_numbers_of(given),
        *[None if x is None else (x.dtype, x.shape, x.stride()) for x in inputs],
        *[None if address is None else address & 15 for address in addresses],
    )  # fmt: skip
    found = kept.get(key)
    if found is None:
        results, plan = _record(compute, inputs, len(tensors), where, options)
        # The cache of the keys' lengths is kept, too, so that its id stays unique and stands for the same lengths.
        kept[key] = plan, of_keys if of_keys is not kept else None
        return results
    plan, _ = found
    return compute(tensors, where, options) if plan is None else plan.run(tensors[0], addresses, place)


def _record(
    compute: Pass, inputs: Tensors, count: int, where: Where, options: Options
) -> tuple[tuple[Any, ...], Plan | None]:
    """Return the results of a pass, and its plan if it can be replayed."""
    # Tensors of their own, since a plan must not depend on which inputs are the same tensor.
    inputs = tuple(None if x is None else x.detach() for x in inputs)
    if len(inputs) > count:
        of_options: dict[str, Any] = dict(zip(_TENSORS, inputs[count:], strict=True))
        options = replace(options, **of_options)
    with recorded() as recording:
        results = compute(inputs[:count], where, options)
    # Not among the constants, which stay alive with a plan: the plan is kept with these.
    fixed = [where.cu_seqlens_q, where.cu_seqlens_k] if isinstance(where, Sequences) else []
    try:
        return results, Plan(recording, results, inputs, fixed)
    except _UnknownError:
        return results, None


class _UnknownError(Exception):
    """A launch or a tensor that a plan cannot repeat."""


class Plan:
    """The allocations and launches of a pass.

    A launch finds its arguments in a list, the *pool*: the addresses of the inputs, constants, the addresses of the
    results, and those of the other memory, which is one allocation.
    """

    def __init__(self, recording: Recording, results: Tensors, inputs: Tensors, fixed: list[Tensor]) -> None:
        self._alive = recording.constants
        self._constants: list[Any] = [None]
        self._inputs, self._made = len(inputs), recording.made
        self._lay_out(recording, results)
        memory = {_memory_of(x) for x in (*fixed, *recording.constants)}
        of_inputs = {id(x): position for position, x in enumerate(inputs) if x is not None}
        of_made = {_memory_of(x): (x.data_ptr(), at) for x, at in zip(self._made, self._made_at, strict=True)}
        scratch_at = iter(self._scratch_at)
        self._launches = []
        self._direct: list[tuple[DirectLaunch, Callable[[list[Any]], tuple[Any, ...]], int]] | None = []
        for template, tensors in recording.launches:
            assert template is not None
            sources = []
            for x in tensors:
                if id(x) in of_inputs:
                    sources.append(of_inputs[id(x)])
                elif x is None or x.numel() == 0:
                    sources.append(self._inputs)
                elif _memory_of(x) in memory:
                    sources.append(self._inputs + len(self._constants))
                    self._constants.append(x.data_ptr())
                else:
                    address, position = of_made.get(_memory_of(x), (None, 0))
                    if x.data_ptr() != address:
                        raise _UnknownError
                    sources.append(position)
            self._launches.append((template, itemgetter(*sources)))
            self._add_direct(template, sources, next(scratch_at))
        self._made = [_without_memory(x) for x in recording.made]
        scratch = torch.empty(self._bytes, dtype=torch.int8, device=recording.made[0].device)
        self._scratch = _without_memory(scratch) if self._bytes else None

    def _lay_out(self, recording: Recording, results: Tensors) -> None:
        """Assign positions, counted from the end of the pool, to what the pass allocates."""
        if any(template is None for template, _ in recording.launches):
            raise _UnknownError
        made = {id(x): i for i, x in enumerate(recording.made)}
        if any(x is not None and id(x) not in made for x in results):
            raise _UnknownError
        returned = sorted({made[id(x)] for x in results if x is not None})
        if any(fill is not None and i not in returned for i, fill in enumerate(recording.fills)):
            raise _UnknownError
        self._fills = [recording.fills[i] for i in returned]
        self._returned = returned
        self._results = [None if x is None else returned.index(made[id(x)]) for x in results]
        sizes: list[int] = [x.nbytes for i, x in enumerate(recording.made) if i not in returned]
        scratch = [0 if x is None or x.direct is None else x.direct.scratch_bytes for x, _ in recording.launches]
        sizes += [size for size in scratch if size]
        starts = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
        self._offsets, self._bytes = starts[:-1], starts[-1]
        first = -len(sizes) - len(returned)
        order = [*returned, *(i for i in range(len(made)) if i not in returned)]
        self._made_at = [first + order.index(i) for i in range(len(made))]
        # The constant None for a launch without descriptors.
        left = iter(range(first + len(made), 0))
        self._scratch_at = [next(left) if size else self._inputs for size in scratch]

    def _add_direct(self, template: Template, sources: list[int], scratch_at: int) -> None:
        """Add the direct launch of a template, whose arguments are in the pool like its addresses."""
        if self._direct is None or template.direct is None:
            self._direct = None
            return
        first = self._inputs + len(self._constants) - len(sources)
        self._constants += template.numbers
        positions = [sources[i] if i < len(sources) else first + i for i in template.run_time]
        self._direct.append((template.direct, itemgetter(*positions), scratch_at))

    def allocate(self) -> tuple[list[Tensor], Tensor | None]:
        """Return the results, and the memory for everything else, None if the pass needs none."""
        made = self._made
        results = [
            torch.empty_like(made[i]) if fill is None else torch.full_like(made[i], fill)
            for i, fill in zip(self._returned, self._fills, strict=True)
        ]
        return results, None if self._scratch is None else torch.empty_like(self._scratch)

    def allocated(self, results: list[Tensor], memory: Tensor | None) -> list[Tensor]:
        """Return what the pass allocates in its own order, given what :meth:`allocate` has returned."""
        left, offsets, found = iter(results), iter(self._offsets), []
        for i, x in enumerate(self._made):
            if i in self._returned:
                found.append(next(left))
            else:
                assert memory is not None
                start = next(offsets)
                found.append(memory[start : start + x.numel() * x.element_size()].view(x.dtype).view(x.shape))
        return found

    def run(self, q: Tensor, addresses: list[int | None], place: Place) -> Tensors:
        """Run the pass for inputs at these addresses; q is one of them."""
        results, memory = self.allocate()
        start = 0 if memory is None else memory.data_ptr()
        own = [x.data_ptr() for x in results]
        pool = [*addresses, *self._constants, *own, *[start + offset for offset in self._offsets]]
        if self._direct is None or hooked():
            for template, addresses_in in self._launches:
                template.launch(place, q, addresses_in(pool))
        else:
            with on_device_of(q, place):
                for launch, arguments_in, scratch_at in self._direct:
                    launch.launch(place[1], arguments_in(pool), pool[scratch_at])
        return tuple([None if position is None else results[position] for position in self._results])


def _memory_of(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _without_memory(x: Tensor) -> Tensor:
    """Return a contiguous tensor of the same layout that takes no memory; ``empty_like`` only reads the layout."""
    made = torch.empty_like(x)
    made.untyped_storage().resize_(0)
    return made
