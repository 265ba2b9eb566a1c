"""The command line as ``python -m maskattn``."""

from maskattn.cli import entry_point

entry_point()
