"""Run the kernel launchers on the inputs of ``oracles`` and name their results as the reference does."""

from __future__ import annotations

import collections.abc

import pytest
import torch
from oracles import Inputs, Results, cu_seqlens, named
from torch import Tensor

from maskattn.kernels.attention import backward, forward
from maskattn.kernels.attention.backward import packed_backward
from maskattn.kernels.attention.forward import packed_forward
from maskattn.kernels.attention.masked import MOVED_FROM, masked_backward, masked_forward
from maskattn.kernels.tables.config import Config
from maskattn.operands import Mask, Sequences
from maskattn.results import Outputs

# Every tile width and widths between them, cycling through the dtypes.
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
WIDTHS_AND_DTYPES = [
    *((16, HALF), (24, SINGLE), (32, BRAIN), (48, HALF), (48, BRAIN), (64, SINGLE), (64, HALF), (80, SINGLE)),
    *((80, BRAIN), (128, SINGLE), (128, HALF), (256, HALF)),
]


def run_packed(
    inputs: Inputs, lengths_q: collections.abc.Sequence[int], lengths_k: collections.abc.Sequence[int], device: str
) -> Results:
    """out, lse and every gradient of the packed launchers."""
    x = inputs.to(device)
    sequences = packed_sequences(lengths_q, lengths_k, device)
    outputs = Outputs(*packed_forward(x.q, x.k, x.v, sequences, x.options))
    grads = packed_backward(x.grads, x.qkv, outputs, sequences, x.options)
    return _checked(x, named(x, outputs.out, outputs.lse, grads))


def run_masked(inputs: Inputs, keep: Tensor, skip_queries: bool, device: str, moved_from: int = MOVED_FROM) -> Results:
    """out, lse and every gradient of the masked launchers."""
    x, keep = inputs.to(device), keep.to(device)
    mask = Mask(keep, skip_queries)
    outputs = masked_forward(x.qkv, mask, x.options, moved_from)
    grads = masked_backward(x.grads, x.qkv, outputs, mask, x.options, moved_from)
    return _checked(x, named(x, outputs.out, outputs.lse, grads))


def packed_sequences(
    lengths_q: collections.abc.Sequence[int], lengths_k: collections.abc.Sequence[int], device: str
) -> Sequences:
    """The sequences of these lengths, one after another."""
    return Sequences(
        cu_seqlens(lengths_q).to(device),
        cu_seqlens(lengths_k).to(device),
        max(lengths_q, default=0),
        max(lengths_k, default=0),
    )


def force(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every pass use one configuration. The tables choose one for a device, but each of them must be correct."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "choose", lambda *_: config)


def _checked(x: Inputs, results: Results) -> Results:
    """Check that the results are contiguous and have the expected dtype."""
    assert (results["out"].dtype, results["lse"].dtype) == (x.q.dtype, torch.float32)
    assert all(result.is_contiguous() for result in results.values())
    return results
