"""A process that opens and decodes one slide at a time for another process, which survives its crashes and hangs.

Decoders are C libraries that read files from scanners, network drives and broken copies. A damaged file can make one
crash (a wrong offset table of a DICOM slide) or run out of memory, which no ``except`` catches. The process imports the
decoders and nothing else, and takes over its owner's ``sys.path``, so a script needs no ``__main__`` guard.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any

import numpy as np

from maskattn.slide.formats.image import SlideImage
from maskattn.slide.formats.remedies import said_by

__all__ = ["DecoderCrashed", "DecoderStalled", "DecodingProcess", "serve"]

_SERVE = "import sys; sys.path[:] = {path!r}; from {module} import serve; serve({handle}, {shared})"
# Pixels come through memory that both processes share; if they do not fit, or there is none, through the socket.
_SHARED_BYTES = 64 << 20
_ENDS_WITHIN_S = 5.0
_LAST_WORDS_BYTES = 2000
# Numpy's OpenBLAS starts threads when it is imported, which spin for a tenth of a second before they sleep unless told.
_ENVIRONMENT = {"OPENBLAS_THREAD_TIMEOUT": "4"}


class DecoderCrashed(Exception):  # noqa: N818 -- named for what happened
    """The process ended; the message says how, with the last line that it wrote."""


class DecoderStalled(Exception):  # noqa: N818 -- named for what happened
    """The process did not answer in time and was killed."""


class DecodingProcess:
    """A client of :func:`serve` running in a separate process, which ends with this object or with its owner.

    Args:
        answers_within_s: the time that an answer may take, in seconds.
    """

    def __init__(self, answers_within_s: float) -> None:
        self.owner = os.getpid()
        self._environment = dict(os.environ)
        self._answers_within_s = answers_within_s
        self._written = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the process
        ours, theirs = socket.socketpair()
        shared = _shared_file()
        self._shared = None if shared is None else np.frombuffer(mmap.mmap(shared, _SHARED_BYTES), np.uint8)
        handles = (theirs.fileno(), *(() if shared is None else (shared,)))
        code = _SERVE.format(path=sys.path, module=__name__, handle=theirs.fileno(), shared=shared)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=self._written,
                stderr=self._written,
                pass_fds=handles,
                env=_ENVIRONMENT | self._environment,
            )
        if shared is not None:
            os.close(shared)
        self._connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self._process, self._connection, self._written)

    def alive(self) -> bool:
        """Return whether the process is still running."""
        return self._process.poll() is None

    def is_reusable(self) -> bool:
        """Return whether it serves this process, and has its environment, in which stores' credentials may be."""
        # A fork inherits the object, but must not use the process.
        return self.owner == os.getpid() and self._environment == dict(os.environ) and self.alive()

    def ask(self, request: str, *arguments: Any) -> Any:
        """Send a request and return its answer; an exception that comes as the answer is raised here.

        Raises:
            DecoderCrashed: the process ended.
            DecoderStalled: the process did not answer in time.
        """
        try:
            self._connection.send((request, arguments))
            answer = self._receive()
            if isinstance(answer, _Pixels):
                if answer.shared:
                    assert self._shared is not None
                    return self._shared[: math.prod(answer.shape)].reshape(answer.shape).copy()
                pixels = np.empty(answer.shape, np.uint8)
                self._connection.recv_bytes_into(pixels.data.cast("B"))
                return pixels
        except (EOFError, OSError) as error:
            raise DecoderCrashed(self._how_it_ended()) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _receive(self) -> Any:
        if not self._connection.poll(self._answers_within_s):
            self._process.kill()
            self.end()
            raise DecoderStalled
        return self._connection.recv()

    def _how_it_ended(self) -> str:
        _wait(self._process, self._connection)
        code = self._process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        size = self._written.seek(0, os.SEEK_END)
        self._written.seek(max(0, size - _LAST_WORDS_BYTES))
        lines = [line for line in self._written.read().decode(errors="replace").splitlines() if line.strip()]
        self.end()
        return f"{how}: {said_by(lines[-1])}" if lines else how


@dataclass(frozen=True)
class _Pixels:
    """An answer that is an array: it is in the shared memory, or follows through the socket."""

    shape: tuple[int, ...]
    shared: bool


def _shared_file() -> int | None:
    """Return the descriptor of anonymous memory, which a full ``/dev/shm`` cannot refuse; None on other systems."""
    if not hasattr(os, "memfd_create"):
        return None
    handle = os.memfd_create("maskattn pixels")
    os.ftruncate(handle, _SHARED_BYTES)
    return handle


def _end(process: subprocess.Popen[bytes], connection: Connection, written: IO[bytes]) -> None:
    _wait(process, connection)
    written.close()


def _wait(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()  # which ends the process, unless it hangs
    try:
        process.wait(_ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(handle: int, shared: int | None) -> None:
    """Answer the requests that come through a socket until its other end is closed.

    Args:
        handle: file descriptor of the socket.
        shared: file descriptor of the shared memory, or None.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # its owner ends it
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_owner, args=(handle,), daemon=True).start()
    connection = Connection(handle)
    memory = None if shared is None else np.frombuffer(mmap.mmap(shared, _SHARED_BYTES), np.uint8)
    image: SlideImage | None = None
    with contextlib.suppress(ImportError):  # it is the answer to the first request
        import maskattn.slide.formats.opening  # noqa: F401 -- while the owner is busy with something else
    while True:
        answer: Any = None
        try:
            request, arguments = connection.recv()
        except EOFError:
            return
        try:
            if request != "read" and image is not None:
                image.close()
                image = None
            if request == "open":
                image = _open(*arguments)
                answer = {name: getattr(image, name) for name in SlideImage.__annotations__}
            elif request == "read":
                assert image is not None
                answer = np.ascontiguousarray(image.read(*arguments))
        except Exception as error:  # the owner handles it, whatever it is
            answer = error
        _send(connection, answer, memory)


def _open(*arguments: Any) -> SlideImage:
    from maskattn.slide.formats.opening import open_image

    return open_image(*arguments)


def _send(connection: Connection, answer: Any, memory: np.ndarray | None) -> None:
    if isinstance(answer, np.ndarray):
        shared = memory is not None and answer.nbytes <= memory.nbytes
        if memory is not None and shared:
            memory[: answer.nbytes] = answer.reshape(-1)
        connection.send(_Pixels(answer.shape, shared))
        if not shared:
            connection.send_bytes(answer.data.cast("B"))
        return
    try:
        connection.send(answer)
    except (TypeError, AttributeError, ValueError):  # an error that does not pickle
        connection.send(RuntimeError(f"{type(answer).__name__}: {answer}"))


def _end_with_owner(handle: int) -> None:
    """End this process when its owner's end of the socket closes, so that a hanging decoder never outlives it."""
    poll = select.poll()
    poll.register(handle, 0)  # a hang-up is always reported
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll()):
        pass
    os._exit(0)
