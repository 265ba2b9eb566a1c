"""The start-up time of commands: ``python -m bench.cpu.start_up``, about a minute.

    python -m bench.cpu.start_up --before ../another/checkout     with a second column for that checkout's sources
    python -m bench.cpu.start_up --write                          also writes bench/results/start_up.md

Times are processor time, user and system, of complete processes: the median of five after one that fills the caches,
also that of the sources' bytecode, which an installation has.
The table also names the packages that took longest to import, by ``-X importtime``, without the modules that they
import.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "start_up.md"
LIMIT_S = 0.4
ROUNDS = 5
_MOST_NAMED = 4

HELP = ["--help", *(f"{name} --help" for name in ("infer", "demo", "tissue", "info", "explain", "doctor"))]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    **{f"maskattn {words}": ["-m", "maskattn", *words.split()] for words in (*HELP, "--show-completion bash")},
    "import torch": ["-c", "import torch"],
    # The import that `maskattn infer` needs for its model, and so a script too.
    "import maskattn.nn.slide_model": ["-c", "import maskattn.nn.slide_model"],
    # A whole small slide, which is drawn first: start-up is most of it.
    "maskattn demo": ["-m", "maskattn", "demo", "--out", os.path.join(tempfile.gettempdir(), "start_up_demo")],
}
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)")


def processor_s(arguments: list[str], sources: Path) -> float:
    """Measure the user and system seconds of one process and its children."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, **settings(sources)) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"a command must succeed to be timed, got exit code {process.returncode} of {arguments}")
    return usage.ru_utime + usage.ru_stime


def settings(sources: Path) -> dict[str, object]:
    """Return arguments for a process outside any checkout, which would be imported in place of the intended sources."""
    # The shell is named to typer, since what runs the bench may be none.
    own = {"PYTHONPATH": str(sources), "PYTHONSAFEPATH": "1", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    # An installed package has its bytecode, which the first, uncounted process writes for a checkout.
    own["PYTHONPYCACHEPREFIX"] = os.path.join(tempfile.gettempdir(), "start_up_bytecode")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {"cwd": tempfile.gettempdir(), "env": {**inherited, **own}}


def median_s(arguments: list[str], sources: Path) -> float:
    """Measure the median of several processes, after one that is not counted."""
    return statistics.median([processor_s(arguments, sources) for _ in range(ROUNDS + 1)][1:])


def dearest_packages(arguments: list[str], sources: Path) -> str:
    """Return the packages whose modules took longest to import, with their milliseconds."""
    command = [sys.executable, "-X", "importtime", *arguments]
    text = subprocess.run(command, capture_output=True, text=True, check=True, **settings(sources)).stderr
    spent = Counter[str]()
    for microseconds, package in _IMPORT.findall(text):
        spent[package] += int(microseconds)
    return ", ".join(f"{package} {total / 1000:.0f}" for package, total in spent.most_common(_MOST_NAMED))


def table(before: Path | None) -> str:
    """Return the table in Markdown, with a row for each command."""
    columns = ["command", *(["before, s"] if before else []), "processor time, s", "dearest to import, ms"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 2) + "---|"]
    for name, arguments in COMMANDS.items():
        earlier = []
        if before is not None:
            try:
                earlier = [f"{median_s(arguments, before):.2f}"]
            except RuntimeError:
                earlier = ["not there"]
        cells = [f"`{name}`", *earlier, f"{median_s(arguments, ROOT):.2f}"]
        lines.append("| " + " | ".join([*cells, dearest_packages(arguments, ROOT)]) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Print the table; with ``--write`` keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the root of another checkout, with its extension built")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    rows = table(options.before and options.before.resolve())
    if not options.write:
        return
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "typer", "rich"))
    machine = f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores of {platform.machine()}"
    paragraphs = [
        "# Start-up",
        f"`python -m bench.cpu.start_up`, {datetime.date.today()}, {machine}.",
        f"Processor time, user and system, of whole processes: the median of {ROUNDS}, with the sources compiled to "
        "bytecode, as after an installation. "
        f"A help page is to answer within {LIMIT_S} s.",
        rows,
    ]
    RESULTS.write_text("\n\n".join(paragraphs) + "\n")


if __name__ == "__main__":
    main()
