"""The entry point of the command line: ``maskattn infer | extract | encoders | demo | ...``, one file per command.

This module needs only the standard library, so that it can name what to install if the extra ``slide`` is missing.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings

from maskattn.cli.ending import short_end
from maskattn.cli.imports import imports
from maskattn.cli.streams import lasting_streams

__all__ = ["entry_point", "main"]

# Threads of numpy's OpenBLAS spin after they start and after each product, a tenth of a second unless told, as 2 to the
# 26th cycles; the least is 2 to the 4th. OpenBLAS reads the variable when numpy is imported.
_OPENBLAS_SPINS = ("OPENBLAS_THREAD_TIMEOUT", "4")


def entry_point() -> None:
    """Run the command line as a process of its own, which ends with it."""
    with short_end():
        main()


def main() -> None:
    """Run the command line; exits with 0 = ok, 1 = some slide failed, 2 = wrong usage or unwritable output."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # warnings of libraries are for developers; -W shows them
    os.environ.setdefault(*_OPENBLAS_SPINS)
    try:
        with lasting_streams():
            _run()
    finally:
        _before_the_end()


def _before_the_end() -> None:
    """Spare the interpreter the search of everything for garbage before it ends.

    Triton's bindings would then report leaks (from triton 3.9 on), so that with triton even what is frozen is searched.
    """
    if "triton" in sys.modules:
        gc.unfreeze()
    else:
        gc.freeze()


def _run() -> None:
    try:
        with imports():
            from maskattn.cli.commands import application, called

            app = application(called(sys.argv[1:]))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in {"typer", "rich", "click"}:
            raise
        print(
            f"maskattn: the command line needs the package {error.name}, which is not installed; "
            "pip install 'maskattn[slide]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app(prog_name="maskattn")
