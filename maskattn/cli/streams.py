"""Standard output and standard error of the command line, whose failures never cause a traceback.

After a write has failed, further output is discarded, so that a run finishes and its files are complete. If standard
output cannot be written, the command ends with one line and exit code 2. If its reader has gone (``| head``), the
command ends silently with exit code 141, like a program stopped by SIGPIPE. Failures of standard error are ignored.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

__all__ = ["lasting_streams", "printable"]

_BROKEN_PIPE, _NOT_WRITTEN = 141, 2
_ASCII = {"µ": "u", "×": "x", "−": "-", "–": "-", "·": "*", "²": "2", "…": "...", "→": "->", "≥": ">=", "≤": "<="}
_HANDLER, _CODEC = "maskattn-plain", "maskattn_ascii"


def printable(text: str) -> str:
    """Escape the control characters of a text, except line ends and tabs, so that it is safe on a terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else _as_escape(sign) for sign in text)


def _as_escape(sign: str) -> str:
    if "\udc80" <= sign <= "\udcff":  # an undecodable byte of a file name
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode()


def _in_plain_signs(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that a terminal's encoding lacks: units by ASCII, everything else by escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(sign) or _as_escape(sign) for sign in text), error.end


def _ascii_by_another_name(name: str) -> codecs.CodecInfo | None:
    """Return the ASCII codec under another name: click bypasses a stream whose encoding is named ASCII with UTF-8."""
    if name != _CODEC:
        return None
    plain = codecs.lookup("ascii")
    return codecs.CodecInfo(
        plain.encode,
        plain.decode,
        plain.streamreader,
        plain.streamwriter,
        plain.incrementalencoder,
        plain.incrementaldecoder,
        name=_CODEC,
    )


class _Descriptor(io.RawIOBase):
    """A writable file descriptor that records its first error and discards all later output."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.name = f"<{'stdout' if descriptor == 1 else 'stderr'}>"
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        rest = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(rest)
        try:
            while len(rest) and self.error is None:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self.error = error
        return size


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Replace the standard streams for a command, and set its exit code if standard output could not be written.

    Raises:
        SystemExit: always, with the command's code, or with 2 or 141.
    """
    codecs.register_error(_HANDLER, _in_plain_signs)
    codecs.register(_ascii_by_another_name)
    _open_missing_descriptors()
    before = sys.stdout, sys.stderr
    out = _Descriptor(1)
    sys.stdout = _text(out, before[0])
    sys.stderr = _text(_Descriptor(2), before[1])
    code: object = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if out.error is not None and out.error.errno != errno.EPIPE:
            text = out.error.strerror or str(out.error)
            print(f"maskattn: standard output must be writable, got '{text}'; send it elsewhere", file=sys.stderr)
            code = _NOT_WRITTEN
        elif out.error is not None:
            code = code or _BROKEN_PIPE
        sys.stdout, sys.stderr = before
    raise SystemExit(code)


def _text(raw: _Descriptor, like: TextIO | None) -> TextIO:
    encoding = getattr(like, "encoding", None) or "utf-8"
    if codecs.lookup(encoding).name == "ascii":
        encoding = _CODEC
    return io.TextIOWrapper(raw, encoding, _HANDLER, line_buffering=True, write_through=True)


def _open_missing_descriptors() -> None:
    """Reopen closed standard descriptors, because otherwise the next opened file would become standard output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Opened read-only, so that writing to it fails as on a closed descriptor.
            opened = os.open(os.devnull, os.O_RDONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
