"""A slide image that is decoded in a separate process; see :mod:`maskattn.slide.formats.decoding_process`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.errors import ReadingStopped
from maskattn.shapes import UInt8
from maskattn.slide.formats.decoding_process import DecoderCrashed, DecoderStalled, DecodingProcess
from maskattn.slide.formats.image import DecodeError

__all__ = ["IsolatedDecoding", "IsolatedImage", "start_ahead"]

_ANSWERS_WITHIN_S = 120.0
_MOST_CRASHES = 16

# A process that has finished with one slide is reused for the next, because starting one takes a fifth of a second.
_idle: list[DecodingProcess] = []


class IsolatedDecoding:
    """Opens one slide's image as often as needed, and counts the crashes of its decoder.

    A crash counts as damage of the region that was read, and the reader goes on with the next region. Reading the slide
    stops at the 16th crash, at a crash while opening, or when the decoder once fails to answer within two minutes.
    """

    def __init__(self) -> None:
        self._crashes = 0
        self._stopped: str | None = None

    def open(self, path: Path, *arguments: Any) -> IsolatedImage:
        """Open the slide, with the arguments of :func:`maskattn.slide.formats.opening.open_image`.

        Raises:
            SlideError: the slide cannot be opened; the message is that function's.
            ReadingStopped: the decoder crashed while opening or too often, or did not answer.
        """
        self.check()
        return IsolatedImage(self, path, *arguments)

    def check(self) -> None:
        """Check that the slide may still be read.

        Raises:
            ReadingStopped: reading was stopped before; the message is the one it was stopped with.
        """
        if self._stopped is not None:
            raise ReadingStopped(self._stopped)

    def crashed(self, path: Path, how: str, *, opening: bool) -> None:
        """Count a crash.

        Args:
            path: the slide file, for the message.
            how: the signal or exit code, and the decoder's last words.
            opening: whether the file was being opened.

        Raises:
            ReadingStopped: it happened while opening, or is one too many.
        """
        self._crashes += 1
        if opening or self._crashes >= _MOST_CRASHES:
            when = "while it opened" if opening else f"{self._crashes} times"
            self._stop(
                f"a slide must not crash its decoder, got '{path}', which did {when} ({how}); the file is damaged or "
                "of an unusual make: copy it again, or convert it to a tiled pyramidal TIFF"
            )

    def stalled(self, path: Path) -> None:
        """Stop the slide, because its decoder did not answer.

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
        decoding: the slide's record of crashes and stalls.
        path: the slide file.
        arguments: further arguments of :func:`maskattn.slide.formats.opening.open_image`.
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
        # The decoding process keeps its working directory, whatever this process has changed to since it started.
        self._decoding, self._path, self._arguments = decoding, path.absolute(), arguments
        self._process: DecodingProcess | None = None
        self._open()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> UInt8[np.ndarray, "H W C"]:
        """Decode a rectangle of a level, in its own pixels."""
        self._decoding.check()
        assert self._process is not None, "the image is closed"
        if not self._process.alive():  # it was killed while idle, perhaps for lack of memory
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
        """Return the process's answer; report its crash or stall to ``decoding``."""
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
        """Close the file; its process is kept for the next one."""
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


def start_ahead() -> None:
    """Start the process for the next slide, so that it imports the decoders while this one does something else."""
    if not _idle:
        _idle.append(DecodingProcess(_ANSWERS_WITHIN_S))


def _process() -> DecodingProcess:
    while True:
        try:
            process = _idle.pop()
        except IndexError:  # it is empty, or another thread was quicker
            break
        if process.is_reusable():
            return process
    return DecodingProcess(_ANSWERS_WITHIN_S)
