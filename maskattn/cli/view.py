"""``maskattn view``: shows slides and their maps in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskattn.cli.options import Debug, SlidesFolder
from maskattn.cli.reporting import errors_in_one_line, say
from maskattn.cli.signals import Ended

__all__ = ["view"]


def view(
    path: Annotated[
        Path,
        typer.Argument(
            help="A folder of outputs, a slide, or a folder or table of slides.",
            metavar="OUT|SLIDE",
            show_default=False,
        ),
    ],
    port: Annotated[
        int, typer.Option("--port", help="Port on the loopback address; 0 takes a free one.", min=0, max=65535)
    ] = 8651,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    slides: SlidesFolder = None,
    debug: Debug = False,
) -> None:
    """View slides and their maps in a browser.

    The page is served only on this machine's loopback address and needs no network. Press Ctrl-C to end.
    """
    with errors_in_one_line(debug):
        from maskattn.viewer.answers import Answers
        from maskattn.viewer.catalogue import read_catalogue
        from maskattn.viewer.server import ViewerServer

        answers = Answers(read_catalogue(path, slides))
        try:
            server = ViewerServer(answers, port)
        except OSError as error:
            raise ValueError(
                f"the viewer needs a free port, got {port}: {error.strerror or error}; choose another with --port, or "
                "0 for any free one"
            ) from error
        with server:
            answers.open_first()
            say(f"viewer      {server.url} (Ctrl-C ends it)")
            if browser:
                _open_browser(server.url)
            try:
                server.serve_forever()
            except Ended:
                raise
            except KeyboardInterrupt:
                say("ended")


def _open_browser(url: str) -> None:
    """Open the page if there is a display; a text browser would take over the terminal."""
    import os
    import sys
    import webbrowser

    if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)
