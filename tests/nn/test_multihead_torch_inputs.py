"""The inputs with which torch tests its own layer, through both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from maskattn.nn import MultiheadAttention

# In a process of its own, because torch's test tools change torch's global settings. They want expecttest for a base
# class that none of this needs.
WRITE_INPUTS = """
import sys, types, unittest
try:
    import expecttest
except ModuleNotFoundError:
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase
import torch
from torch.testing._internal.common_modules import module_inputs_torch_nn_MultiheadAttention
inputs = module_inputs_torch_nn_MultiheadAttention(None, "cpu", torch.float64, False, True)
torch.save([(x.constructor_input.args, x.constructor_input.kwargs, x.forward_input.args, x.forward_input.kwargs)
            for x in inputs], sys.argv[1])
"""


@pytest.fixture(scope="module")
def torchs_inputs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    path = tmp_path_factory.mktemp("inputs") / "inputs.pt"
    command = [sys.executable, "-W", "ignore", "-c", WRITE_INPUTS, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    inputs = torch.load(Path(path))
    assert len(inputs) >= 64
    return inputs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("with_batch", [False, True])
def test_torchs_own_test_inputs_give_torchs_results(torchs_inputs, training, need_weights, with_batch):
    for constructor_args, constructor, tensors, masks in torchs_inputs:
        layers = [
            layer(*constructor_args, **constructor).double().train(training)
            for layer in (nn.MultiheadAttention, MultiheadAttention)
        ]
        layers[1].load_state_dict(layers[0].state_dict())
        if with_batch:
            tensors, masks = _with_batch(tensors, masks, constructor["batch_first"])
        ours_and_theirs = []
        for layer in layers:
            leaves = [x.detach().clone().requires_grad_() for x in tensors]
            results = [x for x in layer(*leaves, **masks, need_weights=need_weights) if x is not None]
            wanted = [*leaves, *layer.parameters()]
            grads = torch.autograd.grad(sum(x.sin().sum() for x in results), wanted, materialize_grads=True)
            ours_and_theirs.append((results, grads))
        (expected, expected_grads), (got, grads) = ours_and_theirs
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(grads, expected_grads)


def _with_batch(tensors: tuple, masks: dict, batch_first: bool) -> tuple[list, dict]:
    """Two sequences of which torch's unbatched one is the first."""
    axis = 0 if batch_first else 1
    tensors = [torch.stack([x, x.flip(0)], dim=axis) for x in tensors]
    keys, dense = masks["key_padding_mask"], masks["attn_mask"]
    keys = None if keys is None else torch.stack([keys, ~keys])
    # The second sequence keeps the one key that the first masks.
    dense = None if dense is None else torch.cat([dense, ~dense])
    return tensors, {"key_padding_mask": keys, "attn_mask": dense}
