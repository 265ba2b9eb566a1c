"""HTML that is escaped by construction: what is no :class:`Markup` is text, whatever it holds."""

from __future__ import annotations

import html
from collections.abc import Iterable

from maskattn.slide.names import as_text

__all__ = ["Markup", "element", "joined"]

_EMPTY = frozenset(("img", "br", "meta", "input"))


class Markup(str):
    """HTML that :func:`element` made."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | int | bool) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: what it holds; text is escaped, Markup stands as it is.
        attributes: by name, an underscore at the end is dropped and others are hyphens; False leaves one out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"' if value is not True else f" {key}"
        for key, value in attributes.items()
        if value is not False
    )
    if name in _EMPTY:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Markup:
    """Children one after another."""
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children))


def _escaped(text: str) -> str:
    return html.escape(as_text(text))
