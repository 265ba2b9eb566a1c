"""``maskattn view``: slides and their maps in a browser."""

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
        int, typer.Option("--port", help="Of the loopback address; 0 takes a free one.", min=0, max=65535)
    ] = 8651,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser there.")] = True,
    slides: SlidesFolder = None,
    debug: Debug = False,
) -> None:
    """Look at slides and their maps in a browser.

    The page is served on this machine's loopback address alone, and needs no network. Ctrl-C ends it.
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
                f"the viewer needs a port of its own, got {port}: {error.strerror or error}; choose another with "
                "--port, or 0 for a free one"
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
    """Open the page where there is a screen; a browser within the terminal would take it over."""
    import os
    import sys
    import webbrowser

    if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)
