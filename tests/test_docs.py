"""What the README and the docstrings show must run."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
from pathlib import Path

import pytest
import torch

import maskattn

ROOT = Path(__file__).resolve().parents[1]


def test_the_readmes_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == (2, 1000, 384)
    assert names["logits"].shape == (4, 3)
    assert names["maps"].shape == (4, 3, 14, 14)
    assert (names["maps"].movedim(1, 3)[~names["keep"]] == 0).all()
    assert names["attended"].shape == (2, 1000, 6, 64)
    assert (tmp_path / "out" / "drawn" / "prediction.json").is_file()


@pytest.mark.parametrize("module", ["maskattn.attention.api", "maskattn.explain.cdam"])
def test_docstring_examples_run(module):
    tested = importlib.import_module(module)
    names = {**vars(tested), "torch": torch, "Packing": maskattn.Packing}
    result = doctest.testmod(tested, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def test_files_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (ROOT / path).is_file(), f"README names {path}"


def test_the_list_of_public_names_is_up_to_date():
    writer = runpy.run_path(str(ROOT / "docs" / "write_api.py"))
    assert writer["page"]() == writer["PAGE"].read_text(encoding="utf-8"), "run python docs/write_api.py"
