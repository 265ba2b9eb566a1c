"""Attention, forward and training step, against what a user would pick instead: ``pytest bench/test_attention.py``.

Rows of one group are measured in one run and are for comparison with each other; ``extra_info`` carries p20, p50, p80.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from peers import CONTENDERS, prepare, random_inputs


def measure(benchmark, group: str, function: Callable[..., object], arguments: Sequence[object] = ()) -> None:
    """Seven rounds after two of warm-up, in one group of rows to compare; p20, p50 and p80 go to ``extra_info``."""
    benchmark.group = group
    benchmark.pedantic(function, arguments, rounds=7, warmup_rounds=2)
    p20, p50, p80 = np.percentile(benchmark.stats.stats.data, [20, 50, 80])
    benchmark.extra_info.update(
        p20_s=p20, p50_s=p50, p80_s=p80, torch=torch.__version__, machine=platform.processor() or platform.machine()
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("kept", [0.06, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_forward(benchmark, tokens, kept, contender):
    attend, inputs = prepare(contender, *random_inputs(tokens, kept))
    with torch.inference_mode():
        measure(benchmark, f"forward, {tokens} tokens, f = {kept}", attend, inputs)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("kept", [0.3, 1.0])
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_forward_and_backward(benchmark, tokens, kept, contender):
    attend, inputs = prepare(contender, *random_inputs(tokens, kept))
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step() -> object:
        return torch.autograd.grad(attend(*leaves).sum(), leaves)

    measure(benchmark, f"forward and backward, {tokens} tokens, f = {kept}", step)
