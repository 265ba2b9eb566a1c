"""The application, with all commands or with the one that is called; a command imports what it needs when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import typer

__all__ = ["COMMANDS", "application", "called"]

# Each is the function of this name in the module of this name, in the order of the help page.
COMMANDS = (
    "infer",
    "extract",
    "encoders",
    "train",
    "crossval",
    "evaluate",
    "demo",
    "status",
    "report",
    "view",
    "tissue",
    "info",
    "explain",
    "doctor",
)


def application(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """Return the application with some of its commands."""
    app = typer.Typer(
        help="Slide in, prediction and heat maps out; background costs nothing and has no effect.",
        no_args_is_help=True,
        rich_markup_mode=None,  # plain help: boxes would cost every command the import of rich
        pretty_exceptions_enable=False,
    )
    app.callback()(_no_options)  # or else typer would make an only command the application itself
    for name in commands:
        app.command()(getattr(importlib.import_module(f"maskattn.cli.{name}"), name))
    return app


def called(arguments: Sequence[str]) -> Sequence[str]:
    """Return the commands that a command line needs: the one that it begins with, or else all of them.

    Typer inspects each option of each command before it calls one, which takes longer than most of its other work.
    """
    return arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS


def _no_options() -> None:
    pass
