"""The application with all commands of ``maskattn``."""

from __future__ import annotations

from maskattn.cli.commands import application

__all__ = ["app"]

app = application()
