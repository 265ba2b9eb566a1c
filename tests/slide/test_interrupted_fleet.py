"""A signal may arrive before any line of the code that shares slides: no file of a fleet outlives its last process."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fleet_runs import numbered, run_quickly, whole_outputs

import maskattn.slide.each_slide
import maskattn.slide.fleet
from maskattn.slide.fleet.sharing import Sharing
from maskattn.slide.fleet.uninterrupted import uninterrupted

OBSERVED = (str(Path(maskattn.slide.fleet.__file__).parent), maskattn.slide.each_slide.__file__)
Visit = tuple[str, int, int]
"""A line of a file, and how often it was reached before."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a terminal: a shell lets what it starts in the background ignore Ctrl-C."""
    given = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in given.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextmanager
def before_each_line(reached: Callable[[Visit], None]) -> Iterator[None]:
    """Call ``reached`` before each line of the observed files, in this thread."""
    visits: Counter[tuple[str, int]] = Counter()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OBSERVED):
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            visits[place] += 1
            reached((*place, visits[place] - 1))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_a_signal_at_any_line_leaves_no_file_of_the_fleet(tmp_path: Path) -> None:
    lines: list[Visit] = []
    with before_each_line(lines.append):
        run_quickly(tmp_path / "whole", numbered(2), Sharing())
    last = {(file, line): count for file, line, count in lines}
    visits = [visit for visit in lines if visit[2] in (0, last[visit[:2]])]
    assert len(visits) > 200
    for number, visit in enumerate(visits):
        out = tmp_path / str(number)

        def interrupt(reached: Visit, at: Visit = visit) -> None:
            if reached == at:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt), before_each_line(interrupt):
            run_quickly(out, numbered(2), Sharing())
        assert not (out / ".fleet").exists(), (visit, sorted((out / ".fleet").rglob("*")))
        run_quickly(out, numbered(2), Sharing())
        assert whole_outputs(out) == {"s000", "s001"}, visit


def test_a_signal_takes_effect_at_the_end_of_what_it_must_not_break_off() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_that_are_ignored_or_end_the_process_at_once_stay_so() -> None:
    with uninterrupted():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_other_threads_have_no_handlers_to_defer() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
