"""The script that compares swapped models with their originals runs and finds them equal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("timm")
pytest.importorskip("transformers")


def test_the_script_prints_parity_speed_and_refusals(tmp_path):
    out = tmp_path / "adapters.md"
    command = [sys.executable, "-m", "bench.evidence.adapters", "--smoke", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    parity, speed, refused = re.split(r"^## ", out.read_text(), flags=re.MULTILINE)[1:]
    errors = [float(cell) for row in parity.splitlines() if row.startswith("| t") for cell in row.split("|")[2:6]]
    assert len(errors) == 8
    assert max(errors) < 1024 * torch.finfo(torch.float64).eps
    assert speed.count("| timm ViT |") == 1
    assert refused.count("| timm") > 5
