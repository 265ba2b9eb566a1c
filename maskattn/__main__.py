"""The command line as ``python -m maskattn``."""

from maskattn.cli import main

main()
