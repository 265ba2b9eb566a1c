"""The arguments of a registered op: the fields of the dataclasses that an implementation takes, in order.

``torch.library`` supports only tensors and numbers, so an op takes the fields as its arguments and rebuilds the
dataclasses from them. This module treats all fields alike: a field that is added to a dataclass becomes an argument of
every op that uses the dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch

from maskattn.options import Options, maker

__all__ = ["Arguments", "flat"]

_NUMBERS = {"int": "SymInt", "float": "float", "bool": "bool", "str": "str"}


def flat(group: Any) -> Collection[Any]:
    """The fields of a dataclass, in their order."""
    return vars(group).values()


def _type_of(annotation: str | type) -> str:
    """The schema type of a field's annotation: ``Float[Tensor, "H"] | None`` becomes ``Tensor?``."""
    annotation = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    present = annotation.removesuffix("| None").rstrip()
    name = "Tensor" if "Tensor" in present else _NUMBERS[present]
    return name if present == annotation else f"{name}?"


@dataclass(frozen=True)
class Arguments:
    """The arguments of an op.

    Attributes:
        groups: dataclasses, whose fields are the first arguments.
        further: arguments after these, in the syntax of a schema: ``bool need_lse``.
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
        """The arguments in the syntax of ``torch.library``, in parentheses."""
        return f"({', '.join(f'{kind} {name}' for kind, name in self.declared)})"

    @cached_property
    def names(self) -> list[str]:
        """Name of each argument."""
        return [name for _, name in self.declared]

    @cached_property
    def tensors(self) -> list[int]:
        """Indices of the arguments that are tensors or optional tensors."""
        return [i for i, (kind, _) in enumerate(self.declared) if kind.startswith("Tensor")]

    @cached_property
    def constants(self) -> list[int]:
        """Indices of the other arguments."""
        return [i for i in range(len(self.declared)) if i not in self.tensors]

    @cached_property
    def _slices(self) -> list[tuple[Callable[..., Any], slice]]:
        """For each group a function that makes it, and where its fields are."""
        found, begin = [], 0
        for group in self.groups:
            end = begin + len(fields(group))
            found.append((maker(group) if issubclass(group, Options) else group, slice(begin, end)))
            begin = end
        return found

    def grouped(self, given: tuple[Any, ...]) -> list[Any]:
        """The dataclasses and the further arguments, from the flat arguments."""
        slices = self._slices
        return [*[make(*given[own]) for make, own in slices], *given[slices[-1][1].stop :]]

    @cached_property
    def _split(self) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., tuple[Any, ...]]]:
        """Functions that select the tensors, and the constants, from the arguments."""
        return itemgetter(*self.tensors), itemgetter(*self.constants)

    @cached_property
    def _joined(self) -> Callable[..., tuple[Any, ...]]:
        """A function that restores the order of the arguments from the tensors followed by the constants."""
        order = self.tensors + self.constants
        return itemgetter(*sorted(range(len(order)), key=order.__getitem__))

    def save(self, ctx: Any, given: tuple[Any, ...], *further: torch.Tensor) -> None:
        """Save all arguments and some further tensors for a derivative."""
        tensors, constants = self._split
        ctx.save_for_backward(*tensors(given), *further)
        ctx.constants = constants(given)

    def saved(self, ctx: Any) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]:
        """The arguments and the further tensors that :meth:`save` has saved."""
        return self.restored(ctx.saved_tensors, ctx.constants)

    def restored(
        self, tensors: tuple[Any, ...], constants: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]:
        """The same from the saved tensors and the other arguments."""
        count = len(self.tensors)
        return self._joined((*tensors[:count], *constants)), tensors[count:]
