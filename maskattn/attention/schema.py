"""The arguments of a registered op: the fields of the dataclasses that an implementation is given, one after another.

``torch.library`` takes tensors and numbers alone. So an op has the fields as its arguments, and makes the dataclasses
of them again. Nothing here knows one field from another: what is added to a dataclass is an argument of every op that
has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch

__all__ = ["Arguments", "flat"]

_NUMBERS = {"int": "SymInt", "float": "float", "bool": "bool"}


def flat(group: Any) -> Collection[Any]:
    """The fields of a dataclass, in their order."""
    return vars(group).values()


def _type_of(annotation: str | type) -> str:
    """A field's annotation as a schema has it: ``Float[Tensor, "H"] | None`` is ``Tensor?``."""
    annotation = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    present = annotation.removesuffix("| None").rstrip()
    name = "Tensor" if "Tensor" in present else _NUMBERS[present]
    return name if present == annotation else f"{name}?"


@dataclass(frozen=True)
class Arguments:
    """The arguments of an op.

    Attributes:
        groups: dataclasses, whose fields come first.
        further: arguments after these, as a schema has them: ``bool need_lse``.
    """

    groups: tuple[type, ...]
    further: tuple[str, ...] = ()

    @cached_property
    def declared(self) -> list[tuple[str, str]]:
        """Type and name of each argument."""
        of_groups = [(_type_of(x.type), x.name) for group in self.groups for x in fields(group)]
        return of_groups + [(kind, name) for kind, name in (each.split() for each in self.further)]

    @property
    def schema(self) -> str:
        """The arguments as ``torch.library`` has them, with their parentheses."""
        return f"({', '.join(f'{kind} {name}' for kind, name in self.declared)})"

    @cached_property
    def names(self) -> list[str]:
        """Name of each argument."""
        return [name for _, name in self.declared]

    @cached_property
    def tensors(self) -> list[int]:
        """Which arguments are tensors, or may be."""
        return [i for i, (kind, _) in enumerate(self.declared) if kind.startswith("Tensor")]

    @cached_property
    def constants(self) -> list[int]:
        """Which arguments are not."""
        return [i for i in range(len(self.declared)) if i not in self.tensors]

    @cached_property
    def _slices(self) -> list[tuple[type, slice]]:
        found, begin = [], 0
        for group in self.groups:
            end = begin + len(fields(group))
            found.append((group, slice(begin, end)))
            begin = end
        return found

    def grouped(self, given: tuple[Any, ...]) -> list[Any]:
        """The dataclasses and the further arguments, of all arguments."""
        slices = self._slices
        return [*[group(*given[own]) for group, own in slices], *given[slices[-1][1].stop :]]

    @cached_property
    def _split(self) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., tuple[Any, ...]]]:
        """Takes the tensors, and the constants, out of the arguments."""
        return itemgetter(*self.tensors), itemgetter(*self.constants)

    @cached_property
    def _joined(self) -> Callable[..., tuple[Any, ...]]:
        """Takes the arguments in their order out of the tensors with the constants after them."""
        order = self.tensors + self.constants
        return itemgetter(*sorted(range(len(order)), key=order.__getitem__))

    def save(self, ctx: Any, given: tuple[Any, ...], *further: torch.Tensor) -> None:
        """Keep all arguments and some tensors for a derivative."""
        tensors, constants = self._split
        ctx.save_for_backward(*tensors(given), *further)
        ctx.constants = constants(given)

    def saved(self, ctx: Any) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]:
        """The arguments and the tensors that :meth:`save` kept."""
        tensors, count = ctx.saved_tensors, len(self.tensors)
        return self._joined((*tensors[:count], *ctx.constants)), tensors[count:]
