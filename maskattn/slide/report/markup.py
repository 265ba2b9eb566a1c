"""Build HTML that is escaped by construction: every string that is not :class:`Markup` is treated as text."""

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
    """Return an element.

    Args:
        name: the element's tag name.
        children: the contents; text is escaped, Markup is kept.
        attributes: attributes by name, without a trailing underscore and with hyphens for other underscores; False
            omits an attribute, and True writes it without a value.
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
    """Concatenate children, with text escaped."""
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children))


def _escaped(text: str) -> str:
    return html.escape(as_text(text))
