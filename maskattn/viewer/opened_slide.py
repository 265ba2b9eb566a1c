"""A slide while it is looked at: readers that decode side by side, squares of the pyramid as JPEG, its maps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np

from maskattn.errors import SlideError
from maskattn.shapes import UInt8
from maskattn.slide.finished import MapTable, open_maps
from maskattn.slide.reader import SlideReader
from maskattn.viewer.catalogue import Entry
from maskattn.viewer.pyramid import Pyramid

__all__ = ["OpenedSlide"]

_READERS = 2
# Levels up to this size are cut from one view of the whole slide.
_OVERVIEW_PX = 2048
_QUALITY = 85
_SIDE_OF_TILE_PX = 256


class OpenedSlide:
    """One slide, open.

    Args:
        entry: the slide.
        slides_dir: where to look for its file by name.

    Raises:
        SlideError: neither its file nor its maps can be read.
    """

    def __init__(self, entry: Entry, slides_dir: Path | None) -> None:
        self.entry = entry
        self.problem = ""
        """Why the slide's pixels, or its maps, cannot be shown; empty where all can."""
        self.spacing_um: float | None = None
        self.table: MapTable | None = None
        self._slides_dir = slides_dir
        self._readers: queue.Queue[SlideReader | None] = queue.Queue()
        self._has_file = False
        self._closed = False
        self._overview: np.ndarray | None = None
        self._overview_lock = threading.Lock()
        self._opened = ExitStack()
        self._maps_lock = threading.Lock()
        size = self._open_file()
        self._open_maps()
        if size is None and self.table is not None:
            size = self.table.width_px, self.table.height_px
        if size is None:
            raise SlideError(self.problem)
        self.pyramid = Pyramid(*size)

    def _open_file(self) -> tuple[int, int] | None:
        """The slide's size; None where its file cannot be read."""
        try:
            reader, self.spacing_um = self.entry.open(self._slides_dir)
        except (SlideError, OSError) as error:
            self.problem = str(error)
            return None
        self._has_file = True
        self._readers.put(reader)
        for _ in range(_READERS - 1):
            self._readers.put(None)  # opened when it is needed
        return reader.info.width_px, reader.info.height_px

    def _open_maps(self) -> None:
        if not self.entry.has_maps:
            return
        assert self.entry.finished is not None
        try:
            self.table = self._opened.enter_context(open_maps(self.entry.finished.maps_path))
        except SlideError as error:
            self.problem = "; ".join(filter(None, (self.problem, str(error))))

    @contextmanager
    def maps(self) -> Iterator[MapTable]:
        """The slide's maps, for one thread at a time.

        Raises:
            SlideError: there are none.
        """
        if self.table is None:
            raise SlideError(f"a slide must have maps to be asked for them, got none for {self.entry.slide_id!r}")
        with self._maps_lock:
            yield self.table

    def look_over(self) -> None:
        """Make the view of the whole slide, and open what reads beside it, before the first squares are asked for."""
        if not self._has_file:
            return
        with suppress(SlideError):  # reported when a square is requested
            self._whole()
            for _ in range(_READERS):  # they come in turn
                if self._closed:
                    return
                with self._reader():
                    pass

    def close(self) -> None:
        """Close its files; a thread that still reads opens them again for itself."""
        self._closed = True
        idle = [self._readers.get_nowait() for _ in range(self._readers.qsize())]
        for reader in idle:
            if reader is not None:
                reader.close()
            self._readers.put(None)
        with self._maps_lock:
            self._opened.close()
            self.table = None

    def square(self, level: int, column: int, row: int) -> bytes:
        """A square of the pyramid as JPEG; hatched where it cannot be decoded.

        Raises:
            IndexError: there is no such square.
        """
        square = self.pyramid.square(level, column, row)
        size = square.width_px, square.height_px
        try:
            if max(self.pyramid.size_of(level)) <= _OVERVIEW_PX:
                pixels = self._of_overview(level)
                pixels = pixels[square.y_px : square.y_px + size[1], square.x_px : square.x_px + size[0]]
            else:
                step = square.lv0_per_px
                extent = size[0] * step, size[1] * step
                with self._reader() as reader:
                    pixels = reader.read_region(square.x_px * step, square.y_px * step, extent, size, tolerant=True)
        except SlideError:
            pixels = _hatched(size)
        return _jpeg(pixels)

    def tile(self, tile: int) -> bytes:
        """A tile of the model's grid as JPEG; hatched where it cannot be decoded.

        Raises:
            IndexError: there is no such tile.
            SlideError: the slide has no maps, hence no tiles.
        """
        with self.maps() as table:
            if not 0 <= tile < table.tiles:
                raise IndexError(f"a tile must be 0 to {table.tiles - 1}, got {tile}")
            (x_lv0, y_lv0), side = (int(value) for value in table.coords_T2[tile]), table.tile_lv0
        size = _SIDE_OF_TILE_PX, _SIDE_OF_TILE_PX
        try:
            with self._reader() as reader:
                return _jpeg(reader.read_region(x_lv0, y_lv0, (side, side), size, tolerant=True))
        except SlideError:
            return _jpeg(_hatched(size))

    @contextmanager
    def _reader(self) -> Iterator[SlideReader]:
        """A reader that no other thread uses meanwhile."""
        if not self._has_file:
            raise SlideError(self.problem)
        reader = self._readers.get(timeout=150)
        try:
            if reader is None:
                reader, _ = self.entry.open(self._slides_dir)
            yield reader
        finally:
            if self._closed and reader is not None:
                reader.close()
                reader = None
            self._readers.put(reader)

    def _of_overview(self, level: int) -> np.ndarray:
        """A coarse level, from the one view of the whole slide."""
        whole, size = self._whole(), self.pyramid.size_of(level)
        return whole if size == whole.shape[1::-1] else cv2.resize(whole, size, interpolation=cv2.INTER_AREA)

    def _whole(self) -> np.ndarray:
        """The view of the whole slide, made once."""
        with self._overview_lock:
            if self._overview is None:
                finest = max(
                    one for one in range(self.pyramid.levels) if max(self.pyramid.size_of(one)) <= _OVERVIEW_PX
                )
                shrink = 1 << (self.pyramid.levels - 1 - finest)
                width, height = self.pyramid.size_of(finest)
                with self._reader() as reader:
                    self._overview = reader.read_region(
                        0, 0, (width * shrink, height * shrink), (width, height), tolerant=True
                    )
            return self._overview


def _jpeg(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, _QUALITY))
    return data.tobytes()


def _hatched(size_px: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """What is shown in place of pixels that cannot be decoded."""
    rows, columns = np.mgrid[: size_px[1], : size_px[0]]
    stripes = ((rows + columns) // 8 % 4 == 0)[..., None]
    return np.where(stripes, np.uint8(200), np.uint8(232)).repeat(3, axis=2)
