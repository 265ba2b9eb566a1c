"""Commands that pages name exist, and the benches' one way of timing is fair."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import timing

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "bench/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "bench").glob("*/*.sh")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_benches_that_there_are(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\bbench/[\w./]*\w", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"-m (bench[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name} names {module}"


def test_every_bench_that_is_a_command_stands_in_the_table():
    table = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    scripts = [path for path in (ROOT / "bench").rglob("*.py") if path.parent.name in ("gpu", "cpu", "evidence")]
    for path in scripts:
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8") or path.name.startswith("test_"):
            relative = str(path.relative_to(ROOT))
            command = relative if path.name.startswith("test_") else relative[:-3].replace("/", ".")
            assert command in table, f"{relative} is in no row"


@pytest.mark.parametrize("folder", ["gpu", "cpu", "evidence"])
def test_benches_import_one_another_by_their_whole_names(folder):
    modules = {path.stem for path in (ROOT / "bench").glob("*/*.py")}
    for path in sorted((ROOT / "bench" / folder).glob("*.py")):
        bare = set(re.findall(r"^\s*(?:from|import) (\w+)\b(?!\.)", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert not bare & modules, f"{path.name} imports {bare & modules} as if it ran in its own folder"


def test_results_that_the_table_names_are_there():
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / "bench" / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / "bench" / link).exists(), link


class Clock:
    """Stands still but for what calls take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_median_leaves_out_the_first_round_and_each_call_comes_first_as_often():
    clock, order = Clock(), []
    takes = {"a": iter([100.0, 3.0, 1.0, 2.0, 8.0, 9.0]), "b": iter([100.0, 5.0, 5.0, 5.0, 5.0, 5.0])}

    def call(name):
        order.append(name)
        clock.now += next(takes[name])

    took = timing.medians({name: lambda name=name: call(name) for name in takes}, 5, clock=clock)
    assert took == {"a": 3.0, "b": 5.0}
    assert "".join(order) == "abbaabbaabba"


def test_short_calls_are_repeated_and_their_mean_is_taken():
    clock, count = Clock(), 0

    def call():
        nonlocal count
        count += 1
        clock.now += 2.0**-14

    took = timing.medians({"short": call}, 3, clock=clock, repeat_short=True)
    assert took == {"short": 2.0**-14}
    assert count == 1 + 3 * 163
