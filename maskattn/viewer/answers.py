"""The viewer's URLs and their responses.

Slides, maps, squares and tiles are identified by numbers; no part of a URL becomes part of a file path.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

import maskattn
from maskattn.errors import SlideError
from maskattn.slide.colours import COLOUR_MAPS, Kind, colour_limit, colour_table, kind_of_attention
from maskattn.slide.finished import Mosaic, build_mosaic
from maskattn.slide.names import as_text
from maskattn.viewer.assets import read_assets
from maskattn.viewer.bounded_cache import BoundedCache
from maskattn.viewer.catalogue import Catalogue
from maskattn.viewer.opened_slide import OpenedSlide
from maskattn.viewer.pyramid import TILE_PX
from maskattn.viewer.slide_facts import about_slide, finite

__all__ = ["CHUNK", "Answer", "Answers", "refusal"]

CHUNK = 256
_MOST_OPEN_SLIDES = 4
_MOST_JPEG_BYTES = 64 << 20
_MOST_MOSAIC_BYTES = 384 << 20
_MOST_WAIT_S = 60.0  # for a region that is being decoded when the viewer ends
_STRONGEST = 12
_JSON = "application/json; charset=utf-8"


@dataclass(frozen=True)
class Answer:
    """A response.

    Attributes:
        status: the HTTP status.
        kind: the content type of the body.
        body: the body.
        lasting: whether a browser may cache it.
    """

    status: int
    kind: str
    body: bytes
    lasting: bool = False


class Answers:
    """Answers requests for the slides of a catalogue.

    Args:
        catalogue: the slides to show.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        # Part of the page's URLs, so that a browser does not use what it has cached from another run.
        self._start = secrets.token_hex(4)
        self._assets = read_assets()
        self._slides: BoundedCache[OpenedSlide] = BoundedCache(
            _MOST_OPEN_SLIDES, lambda slide: 1, lambda slide: slide.close()
        )
        self._ahead: list[threading.Thread] = []
        self._squares: BoundedCache[bytes] = BoundedCache(_MOST_JPEG_BYTES, len)
        self._mosaics: BoundedCache[Mosaic] = BoundedCache(_MOST_MOSAIC_BYTES, lambda mosaic: mosaic.nbytes)
        index, position = r"(0|[1-9][0-9]{0,8})", r"(-?[0-9]{1,9}(?:\.[0-9]{1,6})?)"
        routes: dict[str, Callable[..., Answer]] = {
            "/api/run": self._run,
            f"/api/slides/{index}": self._slide,
            f"/api/slides/{index}/squares/{index}/{index}_{index}\\.jpg": self._square,
            f"/api/slides/{index}/maps/{index}": self._map,
            f"/api/slides/{index}/maps/{index}/{index}/{index}_{index}\\.f32": self._chunk,
            f"/api/slides/{index}/at/{position}_{position}": self._at,
            f"/api/slides/{index}/tiles/{index}\\.jpg": self._tile,
        }
        self._routes = [(re.compile(pattern), answer) for pattern, answer in routes.items()]

    def answer(self, path: str) -> Answer:
        """Return the response to a request; errors are responses with a sentence.

        Args:
            path: path of the URL, without the query.
        """
        asset = self._assets.get(path)
        if asset is not None:
            return Answer(200, *asset)
        try:
            for pattern, answer in self._routes:
                match = pattern.fullmatch(path)
                if match is not None:
                    return answer(*match.groups())
        except IndexError as error:
            return refusal(404, str(error))
        except SlideError as error:
            return refusal(422, str(error))
        return refusal(404, "there is nothing at this URL; the viewer's page is at /")

    def open_first(self) -> None:
        """Open the slide that the page shows first, in a background thread, so that the page need not wait for it."""
        self._in_background(self._open_first)

    def _open_first(self) -> None:
        with suppress(SlideError):  # reported when the slide is requested
            self._opened(str(self._catalogue.first))

    def close(self) -> None:
        """Close every slide, and wait for background reads: the process must not end while a decoder is running."""
        self._slides.clear()
        while self._ahead:
            self._ahead.pop().join(_MOST_WAIT_S)
            self._slides.clear()  # closes slides that were opened in the meantime

    def _in_background(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._ahead = [one for one in self._ahead if one.is_alive()] + [thread]
        thread.start()

    def _opened(self, number: str) -> OpenedSlide:
        entries, index = self._catalogue.entries, int(number)
        if index >= len(entries):
            raise IndexError(f"a slide must be 0 to {len(entries) - 1}, got {index}")
        return self._slides.get(index, lambda: self._open(index))

    def _open(self, index: int) -> OpenedSlide:
        opened = OpenedSlide(self._catalogue.entries[index], self._catalogue.slides_dir)
        self._in_background(opened.look_over)
        return opened

    def _mosaic(self, number: str, which: str) -> Mosaic:
        opened, index = self._opened(number), int(which)
        with opened.maps() as table:
            if index > len(table.classes):
                raise IndexError(f"a map must be 0 to {len(table.classes)}, got {index}")
        return self._mosaics.get((int(number), index), lambda: self._build(opened, index))

    def _build(self, opened: OpenedSlide, index: int) -> Mosaic:
        with opened.maps() as table:
            return build_mosaic(table, index, CHUNK)

    def _run(self) -> Answer:
        tables = {
            kind: {name: base64.b64encode(colour_table(name).tobytes()).decode() for name in names}
            for kind, names in COLOUR_MAPS.items()
        }
        return _json(
            {
                **self._catalogue.as_json(),
                "version": maskattn.__version__,
                "start": self._start,
                "colours": tables,
                "square_px": TILE_PX,
                "chunk": CHUNK,
            }
        )

    def _slide(self, number: str) -> Answer:
        try:
            return _json(about_slide(self._opened(number)))
        except SlideError as error:
            return _json({"problem": as_text(str(error))})

    def _square(self, number: str, level: str, column: str, row: str) -> Answer:
        opened = self._opened(number)
        key = tuple(map(int, (number, level, column, row)))
        body = self._squares.get(key, lambda: opened.square(*key[1:]))
        return Answer(200, "image/jpeg", body, lasting=True)

    def _map(self, number: str, which: str) -> Answer:
        mosaic, index = self._mosaic(number, which), int(which)
        with self._opened(number).maps() as table:
            values_T = table.values_MT[index]
            of_class = index < len(table.classes)
            kind: Kind = "diverging" if of_class else kind_of_attention(values_T)
            order = np.argsort(values_T, kind="stable")
            signed = {"for": order[::-1][:_STRONGEST], "against": order[: _STRONGEST if kind == "diverging" else 0]}
            strongest = {
                name: [
                    {"tile": int(tile), "value": finite(values_T[tile]), "x": int(x), "y": int(y)}
                    for tile, (x, y) in ((tile, table.coords_T2[tile]) for tile in tiles)
                    if (values_T[tile] > 0) == (name == "for") and values_T[tile] != 0
                ]
                for name, tiles in signed.items()
            }
        return _json(
            {
                "kind": kind,
                "of_class": of_class,
                "limits": colour_limit(mosaic.levels[0], kind),
                "step": mosaic.step_lv0,
                "levels": [list(level.shape[::-1]) for level in mosaic.levels],
                "strongest": strongest,
            }
        )

    def _chunk(self, number: str, which: str, level: str, column: str, row: str) -> Answer:
        chunk = self._mosaic(number, which).chunk(int(level), int(column), int(row), CHUNK)
        return Answer(200, "application/octet-stream", chunk.astype("<f4").tobytes(), lasting=True)

    def _at(self, number: str, x: str, y: str) -> Answer:
        """Describe a position: its tile, and the values of the tile and of its token in every map."""
        position = float(x), float(y)
        with self._opened(number).maps() as table:
            tile = table.tile_at(*position)
            if tile is None:
                return _json({"tile": None})
            corner = [int(value) for value in table.coords_T2[tile]]
            tokens = table.tokens_of(tile)
            about: dict[str, Any] = {
                "tile": tile,
                "corner": corner,
                "side": table.tile_lv0,
                "values": [finite(value) for value in table.values_MT[:, tile]],
            }
            if tokens is not None:
                h, w = tokens.keep_hw.shape
                row, column = (
                    min(int((at - start) * count / table.tile_lv0), count - 1)
                    for at, start, count in zip(reversed(position), reversed(corner), (h, w), strict=True)
                )
                about["token"] = {
                    "row": row,
                    "column": column,
                    "kept": bool(tokens.keep_hw[row, column]),
                    "values": [finite(value) for value in tokens.values_Mhw[:, row, column]],
                }
                about["tokens"] = {
                    "rows": h,
                    "columns": w,
                    "values": [[finite(value) for value in values.ravel()] for values in tokens.values_Mhw],
                }
            return _json(about)

    def _tile(self, number: str, tile: str) -> Answer:
        return Answer(200, "image/jpeg", self._opened(number).tile(int(tile)), lasting=True)


def refusal(status: int, sentence: str) -> Answer:
    """Return an error response with a sentence."""
    return _json({"error": sentence}, status)


def _json(value: dict[str, Any], status: int = 200) -> Answer:
    return Answer(status, _JSON, json.dumps(value, allow_nan=False).encode())
