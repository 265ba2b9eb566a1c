"""A slide's image that is decoded in a process of its own; see :mod:`maskattn.slide.formats.decoding_process`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.errors import ReadingStopped
from maskattn.shapes import UInt8
from maskattn.slide.formats.decoding_process import DecoderCrashed, DecoderStalled, DecodingProcess
from maskattn.slide.formats.image import DecodeError

__all__ = ["IsolatedDecoding", "IsolatedImage"]

_ANSWERS_WITHIN_S = 120.0
_MOST_CRASHES = 16

# A process that has served one slide serves the next: starting one takes a fifth of a second.
_idle: list[DecodingProcess] = []


class IsolatedDecoding:
    """Opens one slide's image as often as needed, and counts how often its decoder crashed.

    A crash is damage of the region that was read: the reader goes on with the next. A decoder that crashes again and
    again, or once does not answer within two minutes, stops the slide.
    """

    def __init__(self) -> None:
        self._crashes = 0
        self._stopped: str | None = None

    def open(self, path: Path, *arguments: Any) -> IsolatedImage:
        """Open the slide, with the arguments of :func:`maskattn.slide.formats.opening.open_image`.

        Raises:
            SlideError: it cannot be opened; in the words of that function.
            ReadingStopped: its decoder crashed while opening or too often, or does not answer.
        """
        self.check()
        return IsolatedImage(self, path, *arguments)

    def check(self) -> None:
        """Whether the slide may still be read.

        Raises:
            ReadingStopped: it was stopped, in the words with which it was.
        """
        if self._stopped is not None:
            raise ReadingStopped(self._stopped)

    def crashed(self, path: Path, how: str, *, opening: bool) -> None:
        """Count a crash.

        Raises:
            ReadingStopped: it is one too many.
        """
        self._crashes += 1
        if opening or self._crashes >= _MOST_CRASHES:
            when = "while it opened" if opening else f"{self._crashes} times"
            self._stop(
                f"a slide must not crash its decoder, got '{path}', which did {when} ({how}); the file is damaged or "
                "of an unusual make: copy it again, or convert it to a tiled pyramidal TIFF"
            )

    def stalled(self, path: Path) -> None:
        """The decoder did not answer.

        Raises:
            ReadingStopped: always.
        """
        self._stop(
            f"a decoder must answer within {_ANSWERS_WITHIN_S:g} s, got no answer for '{path}': its drive does not "
            "answer, or the file makes the decoder run for ever; check the drive, copy the file again, or convert it "
            "to a tiled pyramidal TIFF"
        )

    def _stop(self, reason: str) -> None:
        self._stopped = reason
        raise ReadingStopped(reason)


class IsolatedImage:
    """A slide open in another process; see :class:`maskattn.slide.formats.image.SlideImage`.

    Args:
        decoding: informed of crashes and stalls.
        path: the slide file.
        arguments: more of :func:`maskattn.slide.formats.opening.open_image`'s.
    """

    decoder: str
    vendor: str | None
    series: tuple[str, ...]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]
    level_tiles: tuple[tuple[int, int], ...]
    properties: dict[str, str]
    associated_images: tuple[str, ...]

    def __init__(self, decoding: IsolatedDecoding, path: Path, *arguments: Any) -> None:
        # The decoding process stays where the first of its kind was started, whatever folder this one is in by now.
        self._decoding, self._path, self._arguments = decoding, path.absolute(), arguments
        self._process: DecodingProcess | None = None
        self._open()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "H W C"]:
        """Decode a rectangle of a level, in its own pixels."""
        self._decoding.check()
        assert self._process is not None, "the image is closed"
        if not self._process.alive():  # it was ended while it waited, for want of memory perhaps
            self._process.end()
            self._open()
        pixels: np.ndarray = self._ask("read", level, x, y, width, height)
        return pixels

    def _open(self) -> None:
        self._process = _process()
        try:
            self.__dict__.update(self._ask("open", self._path, *self._arguments))
        except Exception:
            self.close()
            raise

    def _ask(self, request: str, *arguments: Any) -> Any:
        """The process's answer; if the process dies, ``decoding`` is informed."""
        assert self._process is not None, "the image is closed"
        try:
            return self._process.ask(request, *arguments)
        except DecoderCrashed as crash:
            self._process = None
            self._decoding.crashed(self._path, str(crash), opening=request == "open")
            raise DecodeError(f"the decoder crashed with {crash}") from crash
        except DecoderStalled:
            self._process = None
            self._decoding.stalled(self._path)
            raise

    def close(self) -> None:
        """Close the file; its process waits for the next one."""
        process, self._process = self._process, None
        if process is None or process.owner != os.getpid():
            return
        try:
            process.ask("close")
        except (DecoderCrashed, DecoderStalled):
            return
        if _idle:
            process.end()
        else:
            _idle.append(process)


def _process() -> DecodingProcess:
    while _idle:
        process = _idle.pop()
        if process.owner == os.getpid() and process.alive():  # a fork has its parent's list, but not its processes
            return process
    return DecodingProcess(_ANSWERS_WITHIN_S)
