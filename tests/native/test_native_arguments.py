"""No arguments bring the extension down: see ``fuzz_arguments.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from maskattn import _native

FUZZ = Path(__file__).with_name("fuzz_arguments.py")


@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_arguments_never_crash(seed):
    command = [sys.executable, "-W", "ignore", str(FUZZ), str(_native.__file__), str(seed), "1500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    last = done.stdout.rstrip().rsplit("\n", 1)[-1]
    assert done.returncode == 0, f"exit {done.returncode} in {last}\n{done.stderr[-3000:]}"
    assert last == "survived"
