"""Importing this lets timm be imported beside a torchvision that was built for another torch; the tests know how."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

if not hasattr(torch.ops.torchvision, "nms"):  # under pytest it is there
    _conftest = Path(__file__).parents[1] / "tests" / "conftest.py"
    _spec = importlib.util.spec_from_file_location("tests_conftest", _conftest)
    assert _spec is not None
    assert _spec.loader is not None
    # Kept, since the operators go with what registered them.
    keeps_operators = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(keeps_operators)
