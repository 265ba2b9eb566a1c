"""Text in pictures: drawn if a font of this machine has its characters, otherwise omitted, never drawn as boxes.

Matplotlib's own font, DejaVu Sans, covers the scripts of Europe, and Pillow draws them from its file. Only other
scripts need matplotlib itself, whose import takes longer than most pictures: they are searched for among the machine's
fonts, once for each script and only when a name needs it. Scripts whose letters join, stack or run from right to left
need a matplotlib that shapes text (3.11 and later, with libraqm); without it such a name is omitted.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.ImageFont import FreeTypeFont

    from maskattn.shapes import UInt8

__all__ = ["drawable", "drawn_line", "families_of", "legible", "wrapped"]

_OWN = "DejaVu Sans"
# Characters of this font that need no shaping: ASCII, Latin, Greek, Cyrillic, punctuation and mathematical signs.
_PLAIN_RANGES = ((0x20, 0x7E), (0xA0, 0xAC), (0xAE, 0x17F), (0x391, 0x3A1), (0x3A3, 0x3CE), (0x400, 0x45F))
_PLAIN = frozenset(chr(code) for first, last in _PLAIN_RANGES for code in range(first, last + 1)) | {*"–—‘’“”„…−≤≥→"}
_EM_UNITS = 2048  # at this size in px an advance width is one in the font's own units, without hinting
# Fonts that cover many scripts are searched first, then all others except those that draw boxes.
_LIKELY = (
    "noto sans",
    "source han sans",
    "wenquanyi",
    "droid sans",
    "arial unicode",
    "unifont",
    "gnu free",
    "freesans",
)
_BOXES = ("last resort", "adobe blank", "tofu")
_INDIC = ("DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM")
_SHAPED = frozenset((*_INDIC, "SINHALA", "THAI", "LAO", "TIBETAN", "MYANMAR", "KHMER", "MONGOLIAN"))
_MOST_LINES = 4
_MARGIN_PX = 4
_FIGURES = frozenset("0123456789.−+")


def drawable(name: str) -> str:
    """Return a name on one line, without control characters; empty if one of its characters cannot be drawn here."""
    text = _cleaned(name)
    if _PLAIN.issuperset(text):
        return text
    if not _is_shaped() and any(map(_needs_shaping, text)):
        return ""
    return text if all(_fonts().family_of(text).values()) else ""


def legible(text: str) -> str:
    """Return a text with each character that cannot be drawn here replaced by a question mark."""
    text = _cleaned(text)
    if _PLAIN.issuperset(text):
        return text
    families = _fonts().family_of(text)
    shaped = _is_shaped()
    return "".join(sign if families[sign] and (shaped or not _needs_shaping(sign)) else "?" for sign in text)


def families_of(text: str) -> list[str]:
    """Return the font families that cover a text, for matplotlib's ``fontfamily``, starting with its own font."""
    if _PLAIN.issuperset(text):
        return [_OWN]
    found = _fonts().family_of(text).values()
    return list(dict.fromkeys([_OWN, *(family for family in found if family)]))


def wrapped(text: str, width_px: float, size_pt: float, dpi: float = 100.0) -> list[str]:
    """Wrap a text into at most four legible lines of a given width; a longer text ends in an ellipsis.

    Args:
        text: the text, which is broken at spaces, and within a word that is too long for a line.
        width_px: width of a line in px.
        size_pt: font size in points.
        dpi: pixels per inch.
    """
    lines, line, line_px = [], "", 0.0
    for word in legible(text).split(" "):
        longer_px = line_px + (_width_px(" ", size_pt, dpi) if line else 0.0) + _width_px(word, size_pt, dpi)
        if longer_px <= width_px:
            line, line_px = f"{line} {word}" if line else word, longer_px
            continue
        if line:
            lines.append(line)
        while _width_px(word, size_pt, dpi) > width_px and len(word) > 1:
            fits = _signs_that_fit(word, width_px, size_pt, dpi)
            lines.append(word[:fits])
            word = word[fits:]
        line, line_px = word, _width_px(word, size_pt, dpi)
    lines.append(line)
    if len(lines) > _MOST_LINES:
        last = lines[_MOST_LINES - 1]
        kept = _signs_that_fit(last, width_px - _width_px("…", size_pt, dpi), size_pt, dpi)
        lines = [*lines[: _MOST_LINES - 1], f"{last[:kept].rstrip()}…"]
    plain = _PLAIN.issuperset(text)
    return [line if plain or not any(map(_is_from_right, line)) else _FROM_LEFT + line for line in lines]


@functools.lru_cache(maxsize=256)  # the pictures of a run share most of their ticks and labels
def drawn_line(text: str, size_pt: float, dpi: float = 100.0) -> tuple[UInt8[np.ndarray, "H W"], int]:
    """Draw one line of legible text: its ink (H, W), 0 for none to 255, read-only, and the row of the baseline.

    Args:
        text: the text, a line of :func:`wrapped`.
        size_pt: font size in points.
        dpi: pixels per inch.
    """
    if not _PLAIN.issuperset(text):
        return _drawn_by_matplotlib(text, size_pt, dpi)
    import numpy as np

    font = _own_font(size_pt * dpi / 72)
    ascent, descent = font.getmetrics()
    ink = np.zeros((ascent + descent, math.ceil(_width_px(text, size_pt, dpi)) + 2), np.uint8)
    left = 0
    for word in text.split(" "):
        # Spaces and digits are whole pixels wide in this font, whatever stands beside them.
        for piece in word if _FIGURES.issuperset(word) else [word]:
            drawn, width = _drawn_piece(piece, font)
            drawn, start = drawn[:, max(0, _MARGIN_PX - left) :], max(0, left - _MARGIN_PX)
            into = ink[:, start : start + drawn.shape[1]]
            np.maximum(into, drawn[:, : into.shape[1]], out=into)
            left += width
        left += _drawn_piece(" ", font)[1]
    ink.flags.writeable = False
    return ink, ascent


@functools.lru_cache(maxsize=1024)  # the titles of a run share most of their words, and its ticks their digits
def _drawn_piece(piece: str, font: FreeTypeFont) -> tuple[UInt8[np.ndarray, "H W"], int]:
    """Draw a word of the own font, (H, W) with a margin at both ends for overhanging strokes, and return its width."""
    import numpy as np
    from PIL import Image, ImageDraw

    (ascent, descent), width = font.getmetrics(), round(font.getlength(piece))
    image = Image.new("L", (width + 2 * _MARGIN_PX, ascent + descent))
    ImageDraw.Draw(image).text((_MARGIN_PX, ascent), piece, fill=255, font=font, anchor="ls")
    return np.asarray(image), width


def _drawn_by_matplotlib(text: str, size_pt: float, dpi: float) -> tuple[np.ndarray, int]:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size_px = size_pt * dpi / 72
    # Letters of other scripts are up to twice as high as Latin ones, and shaping may widen them.
    width, ascent, height = (
        math.ceil(1.2 * _width_px(text, size_pt, dpi) + 8),
        math.ceil(2 * size_px),
        math.ceil(3 * size_px),
    )
    figure = Figure(figsize=((width + 0.5) / dpi, (height + 0.5) / dpi), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    letters: dict[str, Any] = {"fontsize": size_pt, "fontfamily": families_of(text), "parse_math": False}
    figure.text(0, 1 - ascent / height, text, va="baseline", ha="left", **letters)
    canvas.draw()
    ink: np.ndarray = 255 - np.asarray(canvas.buffer_rgba())[:height, :width, 0]
    ink.flags.writeable = False
    return ink, ascent


@functools.lru_cache(maxsize=8)
def _own_font(size_px: float) -> FreeTypeFont:
    """Open DejaVu Sans, if possible without importing matplotlib, which brings it."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        if path.is_file():
            return ImageFont.truetype(path, size_px, layout_engine=ImageFont.Layout.BASIC)
    from matplotlib import font_manager  # a distribution keeps its fonts elsewhere

    return ImageFont.truetype(font_manager.findfont(_OWN), size_px, layout_engine=ImageFont.Layout.BASIC)


def _cleaned(text: str) -> str:
    """Compose a text and remove control, direction, surrogate, private-use and unassigned characters."""
    if _PLAIN.issuperset(text):
        return text.strip()
    spaced = "".join(" " if sign.isspace() else sign for sign in unicodedata.normalize("NFC", text))
    kept = (sign for sign in spaced if sign in "\u200c\u200d" or unicodedata.category(sign) not in _FORMLESS)
    return " ".join("".join(sign for sign in kept if not "\ufe00" <= sign <= "\ufe0f").split(" ")).strip()


# Without this mark, a line that begins with right-to-left text would be laid out entirely from right to left.
_FROM_LEFT = "\u200e"
_FORMLESS = frozenset(("Cc", "Cf", "Cs", "Co", "Cn"))


def _needs_shaping(sign: str) -> bool:
    return _is_from_right(sign) or unicodedata.category(sign) in ("Mn", "Mc") or _script(sign) in _SHAPED


def _is_from_right(sign: str) -> bool:
    return unicodedata.bidirectional(sign) in ("R", "AL", "AN")


def _script(sign: str) -> str:
    return unicodedata.name(sign, "?").replace("-", " ").split(" ")[0]


@functools.cache
def _is_shaped() -> bool:
    from matplotlib import ft2font

    return hasattr(ft2font, "__libraqm_version__")


class _Fonts:
    """The machine's fonts, loaded as far as names have needed them."""

    def __init__(self) -> None:
        from matplotlib import font_manager

        self._own = self._opened(font_manager.findfont(_OWN))
        self._useful: list[tuple[str, Any]] = [(_OWN, self._own)]
        self._family: dict[str, str] = {}
        self._absent: set[str] = set()

    def family_of(self, signs: Iterable[str]) -> dict[str, str]:
        """Return the first family that has each character; empty if none has."""
        signs = set(signs)
        for sign in signs - self._family.keys():
            for family, font in self._useful:
                if font.get_char_index(ord(sign)):
                    self._family[sign] = family
                    break
        unknown = {sign for sign in signs - self._family.keys() if _script(sign) not in self._absent}
        if unknown:
            self._look_for(unknown)
        return {sign: self._family.get(sign, "") for sign in signs}

    def advance_px(self, sign: str, size_pt: float, dpi: float) -> float:
        """Return the advance width of a character in px."""
        family = self.family_of(sign)[sign]
        font = next((font for name, font in self._useful if name == family), self._own)
        font.set_size(size_pt, dpi)
        glyph = font.load_char(ord(sign))
        return math.ceil(glyph.linearHoriAdvance / 65536)  # hinting rounds to integer pixels, up at most

    def _look_for(self, unknown: set[str]) -> None:
        """Search all fonts until every character is found; a script without any match is not searched again."""
        scripts = {_script(sign) for sign in unknown}
        for entry in self._candidates():
            if not unknown:
                return
            font = self._opened(entry.fname)
            if font is None:
                continue
            has = {sign for sign in unknown if font.get_char_index(ord(sign))}
            if has and self._can_draw(entry, font, has):
                self._useful.append((entry.name, font))
                self._family.update(dict.fromkeys(has, entry.name))
                unknown = unknown - has
        self._absent |= scripts - {_script(sign) for sign in self._family}

    @staticmethod
    def _candidates() -> list[Any]:
        from matplotlib import font_manager

        entries = [
            entry
            for entry in font_manager.fontManager.ttflist
            if entry.style == "normal"
            and entry.weight in (400, 500, "normal", "regular", "medium", "book")
            and not getattr(entry, "index", 0)
            and not entry.name.lower().startswith(_BOXES)
        ]
        return sorted(entries, key=lambda entry: (not entry.name.lower().startswith(_LIKELY), entry.name))

    @staticmethod
    def _opened(path: str) -> Any:
        from matplotlib.ft2font import FT2Font

        try:
            font = FT2Font(path)
        except (OSError, RuntimeError):  # removed since the list was made, or broken
            return None
        return font if font.scalable else None

    @staticmethod
    def _can_draw(entry: Any, font: Any, signs: set[str]) -> bool:
        """Return whether matplotlib resolves the family to this file, and the characters have outlines.

        Colour fonts have none.
        """
        from matplotlib import font_manager

        try:
            properties = font_manager.FontProperties(family=entry.name)
            if font_manager.findfont(properties, fallback_to_default=False) != entry.fname:
                return False
            font.set_size(9, 100)
            for sign in signs:
                font.load_char(ord(sign))
            return all(not sign.isalnum() or len(_outline(font, sign)) for sign in signs)
        except (ValueError, RuntimeError):
            return False


def _outline(font: Any, sign: str) -> Any:
    font.load_char(ord(sign))
    return font.get_path()[0]


@functools.cache
def _fonts() -> _Fonts:
    return _Fonts()


@functools.lru_cache(maxsize=4096)
def _advance_px(sign: str, size_pt: float, dpi: float) -> float:
    if sign in _PLAIN:  # hinting rounds to integer pixels, up at most
        return math.ceil(_own_font(_EM_UNITS).getlength(sign) / _EM_UNITS * size_pt * dpi / 72)
    return _fonts().advance_px(sign, size_pt, dpi)


@functools.lru_cache(maxsize=1024)  # the pictures of a run share most of their words
def _width_px(text: str, size_pt: float, dpi: float) -> float:
    return sum(_advance_px(sign, size_pt, dpi) for sign in text)


def _signs_that_fit(text: str, width_px: float, size_pt: float, dpi: float) -> int:
    """Return how many leading characters fit: at least one, without separating a mark from its letter."""
    fits = 1
    while fits < len(text) and _width_px(text[: fits + 1], size_pt, dpi) <= width_px:
        fits += 1
    while 1 < fits < len(text) and unicodedata.category(text[fits]) in ("Mn", "Mc"):
        fits -= 1
    return fits
