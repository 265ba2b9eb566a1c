"""``run.yaml``: settings from a file and from flags, validated by pydantic, and the effective settings written back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from maskattn.files import replacing
from maskattn.slide.asked import asked_of

__all__ = ["RUN_CONFIG", "as_yaml", "plain_values", "read_config", "settings_from", "write_config"]

RUN_CONFIG = "run.yaml"
_MOST_SHOWN = 200
SettingsT = TypeVar("SettingsT")


def read_config(path: Path, kind: type[Any]) -> dict[str, Any]:
    """Read the settings of a file, by field.

    Args:
        path: a YAML file of ``field: value``.
        kind: the dataclass of the settings.

    Raises:
        ValueError: the file cannot be read, is not a mapping, or has an unknown key; the error suggests the nearest
        one.
    """
    import yaml

    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--config must be a readable YAML file, got {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config must be YAML, field: value, got {path}: {' '.join(str(error).split())}") from error
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise ValueError(f"--config must be YAML, field: value, got a {type(held).__name__} in {path}")
    known = [one.name for one in fields(kind)]
    values = {str(key).replace("-", "_"): value for key, value in held.items()}
    unknown = [_suggested(key, known) for key in values if key not in known]
    if unknown:
        raise ValueError(f"--config may have the keys {', '.join(known)}; got {'; '.join(unknown)} in {path}")
    hints = get_type_hints(kind)
    return {name: _as_meant(value, str(hints[name]), path.parent) for name, value in values.items()}


def settings_from(kind: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Return settings with these values and defaults for the others, after checking types and bounds.

    Raises:
        ValueError: values do not fit; the error names every one, with its rule.
    """
    from pydantic import ValidationError

    try:
        checked = _model_of(kind).model_validate(dict(values))  # type: ignore[arg-type]  # classes can be hashed
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, one['loc']))} {_lower_first(one['msg'])}, got {_shown(one.get('input'))}"
            for one in error.errors(include_url=False)
        ]
        raise ValueError(f"the settings of a training must fit their fields: {'; '.join(wrong)}") from error
    return kind(**{one.name: getattr(checked, one.name) for one in fields(kind)})  # type: ignore[arg-type]  # a dataclass


def plain_values(settings: Any) -> dict[str, Any]:
    """Return the settings by field, as plain values for YAML and JSON."""
    values = {one.name: getattr(settings, one.name) for one in fields(settings)}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def as_yaml(settings: Any) -> str:
    """Return the text of ``run.yaml`` for these settings, with absolute paths."""
    import yaml

    values = plain_values(settings)
    for one in fields(settings):
        given = getattr(settings, one.name)
        if isinstance(given, Path):
            values[one.name] = str(given.resolve())
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def write_config(path: Path, settings: Any) -> None:
    """Write the effective settings.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(as_yaml(settings), encoding="utf-8")


@lru_cache
def _model_of(kind: type[Any]) -> Any:
    """Return the pydantic model of a settings dataclass, with its types, defaults and bounds."""
    from pydantic import ConfigDict, Field, create_model

    hints, described = get_type_hints(kind), {}
    for one in fields(kind):
        asked = asked_of(one)
        described[one.name] = (hints[one.name], Field(one.default, ge=asked.minimum, le=asked.maximum))
    config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False, coerce_numbers_to_str=True)
    return create_model(kind.__name__, __config__=config, **described)  # type: ignore[call-overload]  # of fields


def _suggested(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, 0.5)
    return f"{key!r}" + (f" (do you mean {near[0]!r}?)" if near else "")


def _as_meant(value: Any, hint: str, folder: Path) -> Any:
    """Resolve a path relative to the file's folder, and turn a number into text for a field of words (precision)."""
    if "Path" in hint and isinstance(value, str):
        return str(folder / value)
    return str(value) if "Literal" in hint and isinstance(value, int) else value


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
