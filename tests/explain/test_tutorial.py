"""The tutorial's code cells run in order, and their outputs agree with the text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

for module in ("cv2", "openslide", "safetensors", "sklearn", "matplotlib"):
    pytest.importorskip(module)

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def test_the_code_cells_run_in_order(cells, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tutorial"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            code = re.sub(r"^%.*$", "", "".join(cell["source"]), flags=re.MULTILINE)  # lines for the notebook alone
            exec(compile(code, f"tutorial.ipynb, cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    precision = {name: float(value) for name, value in re.findall(r"(\w+): (\d\.\d\d)$", printed, re.MULTILINE)}
    assert precision["CDAM"] > precision["attention"]
    assert precision["CDAM"] > precision["noise"] + 0.3
    assert abs(names["gap"].item()) < 1e-3


def test_figures_are_kept_beside_their_code_and_files_that_the_text_names_are_there(cells):
    pictures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    assert pictures == 3
    for cell in cells:
        for path in re.findall(r"\]\(((?!http|#)[^)#]+)[^)]*\)", "".join(cell["source"])):
            assert (NOTEBOOK.parent / path).exists(), f"the tutorial names {path}"
