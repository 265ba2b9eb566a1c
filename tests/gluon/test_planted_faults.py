"""Faults of barriers, phases, stages, fences and bounds, planted one at a time: the simulator sees each."""

from __future__ import annotations

import pytest
import torch
from oracles import Inputs, packed_inputs
from simulated_attention import check, force
from simulated_launch import Plant
from simulated_values import ProgramError

HAND_BACK = "hand_back(v_ring, block, True, STAGES)"
WAIT = "following, out = hopper.warpgroup_mma_wait(0, deps=(multiplying, adding))"

PLANTS: dict[str, tuple[Plant, ...]] = {
    # Barriers and phases.
    "the producer waits for the wrong phase": (("fetch_block", "parity ^ 1, pred=is_there", "parity, pred=is_there"),),
    "the producer does not wait": (("fetch_block", "parity ^ 1, pred=is_there", "parity ^ 1, pred=False"),),
    "the producer expects half of the bytes": (("fetch_block", "nbytes,", "nbytes // 2,"),),
    "the producer expects no bytes": (("fetch_block", "nbytes,", "nbytes * 0,"),),
    "the producer brings a block too many": (("fetch_blocks", "block + 1 < blocks", "True"),),
    "a consumer does not wait": (("wait_for_block", "parity)", "parity, pred=False)"),),
    "a consumer waits for the wrong phase": (("wait_for_block", "parity)", "parity ^ 1)"),),
    "the phase turns with each block": (("stage_of", "(block // STAGES) & 1", "block & 1"),),
    "a stage is empty once one consumer has read it": (("make_ring", "count=CONSUMERS", "count=1"),),
    "a barrier is not made": (("make_ring", "mbarrier.init(empty.index(stage), count=CONSUMERS)", "pass"),),
    # Stages.
    "another stage is handed back": (("hand_back", "block % STAGES", "(block + 1) % STAGES"),),
    "keys are not handed back": (("attend_block", "hand_back(k_ring, block + 1, True, STAGES)", "pass"),),
    "values are handed back twice": (("attend_block", HAND_BACK, f"{HAND_BACK}; {HAND_BACK}"),),
    "values are handed back before they are read": (
        ("attend_block", HAND_BACK, "pass"),
        ("attend_block", WAIT, f"{HAND_BACK}; {WAIT}"),
    ),
    "a product is read before it is waited for": (("attend_block", WAIT, WAIT.replace("(0", "(1")),),
    "the last product is not waited for": (("attend_blocks", "wait(0, deps=(out,))", "wait(1, deps=(out,))"),),
    "the queries are written without a fence": (("load_queries", "hopper.fence_async_shared()", "pass"),),
    # Bounds.
    "the last block is not masked": (("attend_blocks", "BLOCK_N, True, NATURAL", "BLOCK_N, False, NATURAL"),),
    "a descriptor is a row too long": (("describe_rows", "gl.maximum(length, 1)", "length + 1"),),
    "a block begins a row too late": (("fetch_block", "[block * BLOCK_N, 0]", "[block * BLOCK_N + 1, 0]"),),
    "a row too many is read": (("load_queries", "first + rows < q_length", "first + rows <= q_length"),),
    "a row too many is written": (("store_outputs", "first + rows < q_length", "first + rows <= q_length"),),
    "both consumers have the same rows": (("gluon_forward_kernel", "first + 64, q_start", "first, q_start"),),
}

LENGTHS_Q, LENGTHS_K = [90, 128, 31], [200, 97, 150]


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """With more blocks than stages, and partial last ones."""
    force(monkeypatch, block_n=32, stages=2)
    return packed_inputs(LENGTHS_Q, LENGTHS_K, heads=1, head_width=32, dtype=torch.float16)


@pytest.mark.parametrize("seed", range(6))
def test_without_a_fault_the_same_calls_are_within_the_budget(seed, inputs):
    check(inputs, LENGTHS_Q, LENGTHS_K, seed)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_seen(name, inputs):
    with pytest.raises((ProgramError, AssertionError)):  # noqa: PT012 (whichever turns show it)
        for seed in range(6):
            check(inputs, LENGTHS_Q, LENGTHS_K, seed, *PLANTS[name])
