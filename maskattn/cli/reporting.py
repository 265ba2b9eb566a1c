"""How a command ends: one line that says what went wrong, and the exit code.

Exit codes: 0 = ok, 1 = a slide failed, 2 = wrong usage or an output that cannot be written, 130 = interrupted,
143 and 129 = ended by SIGTERM and SIGHUP.
What a command is asked for goes to stdout; progress and errors go to stderr.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from maskattn.cli.signals import Ended, told_to_end
from maskattn.errors import SlideError

__all__ = ["errors_in_one_line"]

_GO_ON = "finished slides are kept, run the same command again to go on"


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turn an error into one line on stderr and an exit code; with ``debug`` the traceback comes before it."""
    if debug:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("maskattn").setLevel(logging.DEBUG)
    try:
        with told_to_end():
            yield
    except Ended as end:
        _fail(f"{end}; {_GO_ON}", 128 + end.signal)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_GO_ON}", 130)
    except Exception as error:  # the last resort of a command line
        if debug:
            traceback.print_exc()
        _fail(*_in_one_line(error))


def _in_one_line(error: Exception) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = {"timm": "timm", "transformers": "hf"}.get(error.name, "slide")
        return (
            f"this command needs the package {error.name}, which is not installed; pip install 'maskattn[{extra}]'",
            2,
        )
    if isinstance(error, SlideError):
        return text, 1
    if isinstance(error, OSError | ValueError):
        return text, 2
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"maskattn: {message}", err=True)
    raise typer.Exit(code)
