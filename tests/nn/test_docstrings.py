"""What the docstrings of adapters, checkpoints and training show must run."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from maskattn.nn import VisionTransformer

MODULES = ["adapters.timm", "adapters.transformers", "slide_encoders", "random_masks", "optimizer_groups"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    if name.startswith("adapters"):
        pytest.importorskip(name.removeprefix("adapters."))
    module = importlib.import_module(f"maskattn.nn.{name}")
    result = doctest.testmod(
        module, extraglobs={**vars(module), "torch": torch, "VisionTransformer": VisionTransformer}
    )
    assert result.attempted > 0
    assert result.failed == 0
