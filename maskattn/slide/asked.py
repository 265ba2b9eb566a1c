"""Requests are dataclasses; the metadata of each field state its option, and how it is recorded and compared.

The command line has an option for every field, the record of a finished slide contains the fields, and a later run
compares them with its own. All three read the :class:`Asked` of a field, so that a new field is written in one place.
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
        flag: the option on the command line; for a bool, the option that reverses its default.
        help: the option's help text, one sentence.
        minimum: the smallest accepted number; None accepts any.
        maximum: the largest accepted number; None accepts any.
        default: the command line's default; ``...`` means that of the field.
        recorded: whether the record of a slide contains the field.
        before: the value that applied in earlier versions, which did not record the field; ``...`` means the default.
        serves: (found, asked) → whether the outputs of a slide run with the first value satisfy a request for the
            second; None if the field does not affect the outputs.
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
    """Return a dataclass field's metadata, an :class:`Asked` made of these arguments."""
    return {"asked": Asked(flag, help, **more)}


def asked_of(field: Field[Any]) -> Asked:
    """Return the :class:`Asked` of a request's field."""
    rules: Asked = field.metadata["asked"]
    return rules


def fields_of(request: Any) -> list[Field[Any]]:
    """Return the fields of a request or of its class: its own first, then those shared with other requests."""
    kind = request if isinstance(request, type) else type(request)
    return sorted(fields(kind), key=lambda field: field.name not in kind.__annotations__)


def recorded_fields(settings: Any) -> dict[str, Any]:
    """Return the recorded fields of a request by name, as values that JSON can represent."""
    return {one.name: _as_json(getattr(settings, one.name)) for one in fields_of(settings) if asked_of(one).recorded}


def unlike(found: Mapping[str, Any], asked_for: Mapping[str, Any], settings: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, found, asked for) for each setting in which a finished slide does not satisfy the request.

    A field that an earlier version did not record counts as ``Asked.before``, or else as its default.

    Args:
        found: the settings in the record of the slide.
        asked_for: the settings that the record would contain now; names that are not fields are compared by equality.
        settings: the request, or its class.
    """
    by_name = {one.name: one for one in fields(settings)}
    for name, wanted in asked_for.items():
        field = by_name.get(name)
        rules = None if field is None else asked_of(field)
        serves = operator.eq if rules is None else rules.serves
        was = found.get(name, None if field is None or rules is None else _before(field, rules))
        if serves is not None and not serves(was, wanted):
            yield name, was, wanted


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return as_text(value.name)  # a file that was moved is still the same request
    return list(value) if isinstance(value, tuple) else value


def _before(field: Field[Any], rules: Asked) -> Any:
    if rules.before is not ...:
        return rules.before
    return None if field.default is MISSING else field.default
