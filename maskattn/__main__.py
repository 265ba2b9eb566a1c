"""``python -m maskattn`` is the command line."""

from maskattn.cli import main

main()
