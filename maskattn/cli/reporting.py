"""The output and the end of a command: one line for an error, and the exit code.

Exit codes: 0 = ok, 1 = a slide failed, 2 = wrong usage or an output that cannot be written, 130 = interrupted,
143 and 129 = ended by SIGTERM and SIGHUP.
Results go to stdout; progress and errors go to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from maskattn.cli.signals import Ended, told_to_end
from maskattn.cli.streams import printable
from maskattn.errors import GroupError, SlideError

if TYPE_CHECKING:
    from maskattn.slide.prediction import SlideOutcome

__all__ = ["errors_in_one_line", "in_one_line", "map_warnings", "say", "say_json", "tell"]

_EXTRAS = {"timm": "timm", "transformers": "hf", "huggingface_hub": "hf", "js_lib_leaflet": "view", "ray": "ray"}
_EXTRAS |= dict.fromkeys(
    ("pytorch_lightning", "torchmetrics", "pydantic", "yaml", "sklearn", "sksurv", "scipy"), "train"
)
_GO_ON = "{} are kept; run the same command again to resume"


def say(text: str) -> None:
    """Print a line of a result on stdout."""
    print(printable(text))  # typer.echo would send UTF-8 to a terminal of ASCII


def say_json(value: Any) -> None:
    """Print JSON on stdout, in ASCII if the terminal's encoding cannot represent the text."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def tell(text: str) -> None:
    """Print a line on stderr."""
    print(f"maskattn: {printable(text)}", file=sys.stderr)


@contextmanager
def errors_in_one_line(debug: bool, kept: str = "finished slides") -> Iterator[None]:
    """Turn an error into one line on stderr and an exit code.

    Args:
        debug: print the traceback before the line.
        kept: the results that an interrupted command keeps, in words.
    """
    try:
        with _logs(debug), told_to_end():
            yield
    except Ended as end:
        _fail(f"{end}; {_GO_ON.format(kept)}", 128 + end.signal)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_GO_ON.format(kept)}", 130)
    except Exception as error:  # the last resort of a command line
        if debug:
            traceback.print_exc()
        _fail(*in_one_line(error))


@contextmanager
def _logs(debug: bool) -> Iterator[None]:
    """Show the package's own warnings as lines of the command, and with ``debug`` all that any library logs."""
    root, own = logging.getLogger(), logging.getLogger("maskattn")
    if debug:
        logging.basicConfig(level=logging.WARNING)
        own.setLevel(logging.DEBUG)
        yield
        return
    shown, hidden = _Line(logging.WARNING), logging.NullHandler()
    own.addHandler(shown)
    root.addHandler(hidden)
    try:
        yield
    finally:
        own.removeHandler(shown)
        root.removeHandler(hidden)


class _Line(logging.Handler):
    """A handler that prints a warning as one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(" ".join(record.getMessage().split()))


def in_one_line(error: Exception) -> tuple[str, int]:
    """Return the message for the user and the exit code."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = _EXTRAS.get(error.name, "slide")
        return (
            f"this command needs the package {error.name}, which is not installed; pip install 'maskattn[{extra}]'",
            2,
        )
    if isinstance(error, RuntimeError) and "operator torchvision::" in text:  # timm and transformers import it
        return (
            f"torchvision must be built for the torch that is installed, got one that fails to import ({text[:200]}); "
            "install both from one index, as https://pytorch.org/get-started shows",
            2,
        )
    if isinstance(error, SlideError | GroupError):
        return text, 1
    if isinstance(error, OSError | ValueError):
        return text, 2
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _fail(message: str, code: int) -> NoReturn:
    tell(message)
    raise typer.Exit(code)


def map_warnings(outcomes: Iterable[SlideOutcome]) -> list[str]:
    """Return a line for each verdict other than "passed" on the maps of the predicted classes."""
    by_verdict: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.prediction is not None:
            verdict = outcome.prediction.maps.get(outcome.prediction.prediction, {}).get("map_check")
            if verdict in ("weak", "contradicts"):
                by_verdict.setdefault(verdict, []).append(outcome.slide_id)
    return [
        f"map check {verdict}: the predicted class's map of {', '.join(slides[:5])}"
        + (f" and {len(slides) - 5} more" if len(slides) > 5 else "")
        + "; see docs/map_check.md before you rely on it"
        for verdict, slides in sorted(by_verdict.items())
    ]
