"""What a command is asked for is a dataclass, and each of its fields says how the other rooms treat it.

The command line has an option for every field, the record of a finished slide has the fields, and a run that finds one
compares them. All three read the :class:`Asked` of a field, so that a new field is written in one place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from maskattn.slide.names import as_text

__all__ = ["Asked", "asked", "asked_of", "fields_of", "recorded_fields", "unlike"]


@dataclass(frozen=True)
class Asked:
    """The rules by which a field of a request is given, recorded and compared.

    Attributes:
        flag: its option on the command line; of a bool, the option that reverses its default.
        help: what the option does, in a sentence.
        minimum: least number that is taken; None where any is.
        maximum: greatest number that is taken.
        default: the command line's default; ``...`` where it is the field's own.
        recorded: whether the record of a slide has it among its settings.
        before: what an earlier version did, whose records do not say; ``...`` where it is the default.
        serves: (found, asked) → whether a slide that was run with one value is what the other asks for; None where the
            field does not change what is found.
    """

    flag: str
    help: str
    minimum: int | None = None
    maximum: int | None = None
    default: Any = ...
    recorded: bool = True
    before: Any = ...
    serves: Callable[[Any, Any], bool] | None = operator.eq


def asked(flag: str, help: str, **more: Any) -> dict[str, Asked]:
    """The metadata of a field: an :class:`Asked` of these arguments."""
    return {"asked": Asked(flag, help, **more)}


def asked_of(field: Field[Any]) -> Asked:
    """The metadata of a request's field."""
    told: Asked = field.metadata["asked"]
    return told


def fields_of(request: Any) -> list[Field[Any]]:
    """The fields of a request, or of its class: its own, then those that it shares with others."""
    kind = request if isinstance(request, type) else type(request)
    return sorted(fields(kind), key=lambda field: field.name not in kind.__annotations__)


def recorded_fields(settings: Any) -> dict[str, Any]:
    """The fields of a request that the record of a slide has, by name, as JSON has them."""
    return {one.name: _as_json(getattr(settings, one.name)) for one in fields_of(settings) if asked_of(one).recorded}


def unlike(found: Mapping[str, Any], asked_for: Mapping[str, Any], settings: Any) -> Iterator[tuple[str, Any, Any]]:
    """The settings in which a finished slide differs from the request: (name, what was found, what is asked for).

    What an earlier version did not record was not asked for then, and has its default, or what was done before.

    Args:
        found: the settings in the record of the slide.
        asked_for: the settings as the record would have them now; those that are no field are compared as they are.
        settings: the request, or its class.
    """
    by_name = {one.name: one for one in fields(settings)}
    for name, wanted in asked_for.items():
        field = by_name.get(name)
        told = None if field is None else asked_of(field)
        serves = operator.eq if told is None else told.serves
        was = found.get(name, None if field is None or told is None else _before(field, told))
        if serves is not None and not serves(was, wanted):
            yield name, was, wanted


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return as_text(value.name)  # where a file lies is no part of what was asked for
    return list(value) if isinstance(value, tuple) else value


def _before(field: Field[Any], told: Asked) -> Any:
    if told.before is not ...:
        return told.before
    return None if field.default is MISSING else field.default
