"""An open slide: readers that decode in parallel, squares of the pyramid as JPEG, and the slide's maps."""

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
# Levels up to this size are derived from one overview of the slide.
_OVERVIEW_PX = 2048
_QUALITY = 85
_SIDE_OF_TILE_PX = 256


class OpenedSlide:
    """An open slide.

    Args:
        entry: the slide.
        slides_dir: a folder in which to look for its file by name.

    Raises:
        SlideError: neither its file nor its maps can be read.
    """

    def __init__(self, entry: Entry, slides_dir: Path | None) -> None:
        self.entry = entry
        self.problem = ""
        """The reason why the slide's pixels, or its maps, cannot be shown; empty if they can."""
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
        """Open the slide's file and return its width and height in px; None if it cannot be read."""
        try:
            reader, self.spacing_um = self.entry.open(self._slides_dir)
        except (SlideError, OSError) as error:
            self.problem = str(error)
            return None
        self._has_file = True
        self._readers.put(reader)
        for _ in range(_READERS - 1):
            self._readers.put(None)  # opened on first use
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
        """Yield the slide's maps, to one thread at a time.

        Raises:
            SlideError: the slide has no maps.
        """
        if self.table is None:
            raise SlideError(f"the slide must have maps, got none for {self.entry.slide_id!r}; run maskattn infer")
        with self._maps_lock:
            yield self.table

    def look_over(self) -> None:
        """Prepare the overview and open the other readers before the first squares are requested."""
        if not self._has_file:
            return
        with suppress(SlideError):  # reported when a square is requested
            self._overview_of_slide()
            for _ in range(_READERS):  # the queue yields each reader once
                if self._closed:
                    return
                with self._reader():
                    pass

    def close(self) -> None:
        """Close the slide's files; a thread that still needs one opens it again for itself."""
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
        """Return a square of the pyramid as JPEG, hatched if it cannot be decoded.

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
        """Return a tile of the model's grid as JPEG, hatched if it cannot be decoded.

        Raises:
            IndexError: there is no such tile.
            SlideError: the slide has no maps and therefore no tiles.
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
        """Yield a reader that no other thread uses at the same time."""
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
        """Return a coarse level, derived from the overview."""
        overview, size = self._overview_of_slide(), self.pyramid.size_of(level)
        return overview if size == overview.shape[1::-1] else cv2.resize(overview, size, interpolation=cv2.INTER_AREA)

    def _overview_of_slide(self) -> np.ndarray:
        """Return an overview of the entire slide, read once."""
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
    """Return a hatched picture, which replaces pixels that cannot be decoded."""
    rows, columns = np.mgrid[: size_px[1], : size_px[0]]
    stripes = ((rows + columns) // 8 % 4 == 0)[..., None]
    return np.where(stripes, np.uint8(200), np.uint8(232)).repeat(3, axis=2)
