"""The application: all commands of ``maskattn``. A command imports what it needs beyond typer when it runs."""

from __future__ import annotations

import typer

from maskattn.cli.crossval import crossval
from maskattn.cli.demo import demo
from maskattn.cli.doctor import doctor
from maskattn.cli.encoders import encoders
from maskattn.cli.evaluate import evaluate
from maskattn.cli.explain import explain
from maskattn.cli.extract import extract
from maskattn.cli.infer import infer
from maskattn.cli.info import info
from maskattn.cli.report import report
from maskattn.cli.status import status
from maskattn.cli.tissue import tissue
from maskattn.cli.train import train
from maskattn.cli.view import view

__all__ = ["app"]

app = typer.Typer(
    help="Slide in, prediction and heat maps out; background costs nothing and has no effect.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: boxes would cost every command the import of rich
    pretty_exceptions_enable=False,
)
for command in (
    infer,
    extract,
    encoders,
    train,
    crossval,
    evaluate,
    demo,
    status,
    report,
    view,
    tissue,
    info,
    explain,
    doctor,
):
    app.command()(command)
