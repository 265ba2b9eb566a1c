"""What a command loads before it does anything: help and completion load neither torch nor anything of slides."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from maskattn.cli.commands import COMMANDS as COMMANDS_IN_ORDER
from maskattn.cli.commands import called

HEAVY = ("torch", "triton", "numpy", "cv2", "matplotlib", "h5py", "PIL", "tifffile", "openslide", "rich")
COMMANDS = [
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
]


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def maskattn(*arguments: str) -> str:
    """Code that runs the command line, then says what of the heavy packages was loaded."""
    return f"""
import sys
sys.argv = ["maskattn", *{arguments!r}]
from maskattn.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded", *(name for name in {HEAVY!r} if name in sys.modules))
"""


@pytest.mark.parametrize("arguments", [("--help",), *((name, "--help") for name in COMMANDS)], ids=" ".join)
def test_help_is_there_without_torch(arguments: tuple[str, ...]) -> None:
    lines = run(maskattn(*arguments)).splitlines()
    assert lines[-1] == "loaded"
    assert any(line.startswith("Usage: maskattn") for line in lines)


def test_a_command_that_is_called_loads_no_other() -> None:
    loaded = [f"maskattn.cli.{name}" for name in COMMANDS]
    code = maskattn("info", "--help").replace(repr(HEAVY), repr(tuple(loaded)))
    assert run(code).splitlines()[-1] == "loaded maskattn.cli.info"
    assert called(["info", "--help"]) == ["info"]
    assert [*called([])] == [*called(["--help", "info"])] == [*called(["nothing"])] == [*COMMANDS_IN_ORDER] == COMMANDS


def test_the_first_help_names_each_command_in_a_whole_sentence() -> None:
    text = run(maskattn("--help"))
    lines = {line.split()[0]: line for line in text.partition("Commands:")[2].splitlines() if line.startswith("  ")}
    assert set(lines) == set(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines.values())


def test_a_shell_is_told_how_to_complete_and_completes_commands_and_options() -> None:
    # The shell is named, since what runs the tests may be none.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = run(maskattn("--show-completion", "bash"), **named)
    assert "complete -o default -F _maskattn_completion maskattn" in script
    assert script.splitlines()[-1] == "loaded"
    asked = {"_MASKATTN_COMPLETE": "complete_bash", "COMP_WORDS": "maskattn in", "COMP_CWORD": "1"}
    assert run(maskattn(), **asked).splitlines()[:2] == ["infer", "info"]
    asked |= {"COMP_WORDS": "maskattn infer --tok", "COMP_CWORD": "2"}
    assert "--tokens" in run(maskattn(), **asked).splitlines()


def test_the_package_is_a_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "maskattn", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: maskattn ")


def test_a_model_is_there_without_torchs_compiler() -> None:
    code = "import sys, maskattn.nn.slide_model; print([n for n in ('torch._dynamo', 'sympy') if n in sys.modules])"
    assert run(code) == "[]\n"


def test_imports_are_kept_from_the_collector_which_runs_again_afterwards() -> None:
    code = """
import gc
from maskattn.cli.imports import imports
frozen = gc.get_freeze_count()
with imports():
    assert not gc.isenabled()
    import email.mime.text
print(gc.isenabled(), gc.get_freeze_count() > frozen)
frozen = gc.get_freeze_count()
with imports():
    import email.mime.text
print(gc.isenabled(), gc.get_freeze_count() == frozen)
try:
    with imports():
        import there_is_no_such_module
except ModuleNotFoundError:
    print(gc.isenabled())
"""
    assert run(code).splitlines() == ["True True", "True True", "True"]


def test_a_frames_module_is_found_without_a_search_of_all_modules() -> None:
    code = """
import inspect, sys, tokenize
from maskattn.cli.imports import imports
search = inspect.getmodule
def here(): return sys._getframe()
lines = tokenize.generate_tokens(iter([]).__next__).gi_frame
renamed = eval("__import__('sys')._getframe()", {"__name__": "tokenize"})
nameless = eval("__import__('sys')._getframe()", {})
asked = [lines, here(), here, inspect, renamed, nameless]
expected = [search(x) for x in asked]
assert expected[0] is tokenize
with imports():
    assert inspect.getmodule is not search
    assert [inspect.getmodule(x) for x in asked] == expected
    inspect.getabsfile = None  # what a search calls
    print(inspect.getmodule(lines).__name__)
print(inspect.getmodule is search)
"""
    assert run(code).splitlines() == ["tokenize", "True"]


def test_threads_that_wait_do_not_spin_and_what_is_set_already_stays() -> None:
    code = maskattn("--help") + "import os; print(os.environ['OPENBLAS_THREAD_TIMEOUT'])"
    assert run(code, OPENBLAS_THREAD_TIMEOUT="20").splitlines()[-1] == "20"
    unset = "import os; os.environ.pop('OPENBLAS_THREAD_TIMEOUT', None)\n" + code
    assert run(unset).splitlines()[-1] == "4"


def test_annotations_cost_no_import_outside_the_tests() -> None:
    code = "import sys, maskattn.slide.reader, maskattn.nn.slide_model; print('jaxtyping' in sys.modules)"
    assert run(code) == "False\n"


@pytest.mark.parametrize(("triton", "frozen"), [(False, True), (True, False)])
def test_all_is_frozen_at_the_end_but_where_triton_would_report_leaks(triton: bool, frozen: bool) -> None:
    loaded = "import sys, types\nsys.modules['triton'] = types.ModuleType('triton')\n" if triton else ""
    end = "\nimport gc\nprint('frozen', gc.get_freeze_count() > 0)"
    assert run(loaded + maskattn("--help") + end).splitlines()[-1] == f"frozen {frozen}"
