"""Iterate over the features of a GeoJSON file: the text is in memory, but only one decoded feature at a time.

QuPath writes a FeatureCollection, or a bare list of features; children nested in a feature's properties are yielded
after their parent. A single feature or geometry is read too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from maskattn.errors import SlideError
from maskattn.slide.file_checks import problem_of_file
from maskattn.slide.names import as_text

__all__ = ["is_json", "read_features"]

_SPACE = re.compile(r"[ \t\n\r]*")
_EXPORT = "export it anew, in QuPath with File > Export objects as GeoJSON"


def is_json(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins like JSON, with a brace or a bracket; False if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(256)
    except (OSError, ValueError):
        return False
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"["))


def read_features(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the features of a GeoJSON file in order, unchecked; a bare geometry is wrapped in a feature.

    Raises:
        SlideError: the file is missing, is not JSON in UTF-8, or does not fit into memory.
    """
    path = Path(path)
    problem = problem_of_file(path, "mask of outlines")
    if problem is not None:
        raise SlideError(problem)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        yield from _with_children(_features(text))
    except UnicodeDecodeError as error:
        raise _no_json(path, f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _no_json(path, f"at {where} JSON goes wrong: {error.msg}") from error
    except RecursionError as error:
        raise _no_json(path, "lists are nested in lists beyond measure") from error
    except MemoryError as error:
        raise _no_json(path, "it needs more memory than there is") from error
    except SlideError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise _no_json(path, f"a number is too long ({error})") from error
    except OSError as error:
        raise _no_json(path, error.strerror or str(error)) from error


def _no_json(path: Path, what: str) -> SlideError:
    return SlideError(f"outlines must be GeoJSON in UTF-8, got {as_text(path)}, where {what}; {_EXPORT}")


def _with_children(features: Iterator[Any]) -> Iterator[Any]:
    waiting: list[Any] = []
    for feature in features:
        waiting.append(feature)
        while waiting:
            one = waiting.pop()
            yield one
            properties = one.get("properties") if isinstance(one, dict) else None
            for key in ("childObjects", "children"):
                children = properties.get(key) if isinstance(properties, dict) else None
                waiting += reversed(children) if isinstance(children, list) else []


def _features(text: str) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    at = _after_space(text, 0)
    if text[at : at + 1] == "[":
        at = yield from _elements(text, at, decode)
    elif text[at : at + 1] == "{":
        own: dict[str, Any] = {}
        at = yield from _members(text, at, decode, own)
        if own.get("type") == "Feature":
            yield own
        elif own.get("type") not in (None, "FeatureCollection"):
            yield {"type": "Feature", "geometry": own}
    else:
        raise json.JSONDecodeError("Expecting a list or an object", text, at)
    at = _after_space(text, at)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _members(text: str, at: int, decode: Any, own: dict[str, Any]) -> Generator[Any, None, int]:
    """Yield the features of the object at offset ``at``; store its other members in ``own``. Return where it ends."""
    at = _after_space(text, at + 1)
    if text[at : at + 1] == "}":
        return at + 1
    while True:
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        key, at = decode(text, at)
        at = _expect(text, at, ":")
        if key == "features" and text[at : at + 1] == "[":
            at = yield from _elements(text, at, decode)
        else:
            own[key], at = decode(text, at)
        at = _after_space(text, at)
        if text[at : at + 1] == "}":
            return at + 1
        at = _expect(text, at, ",")


def _elements(text: str, at: int, decode: Any) -> Generator[Any, None, int]:
    """Yield the elements of the list at offset ``at``. Return where it ends."""
    at = _after_space(text, at + 1)
    if text[at : at + 1] == "]":
        return at + 1
    while True:
        element, at = decode(text, at)
        yield element
        at = _after_space(text, at)
        if text[at : at + 1] == "]":
            return at + 1
        at = _expect(text, at, ",")


def _expect(text: str, at: int, sign: str) -> int:
    at = _after_space(text, at)
    if text[at : at + 1] != sign:
        raise json.JSONDecodeError(f"Expecting '{sign}'", text, at)
    return _after_space(text, at + 1)


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()
