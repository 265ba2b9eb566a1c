"""Faults planted in backward in one pass, one at a time: the simulator sees each."""

from __future__ import annotations

import pytest
import torch
from oracles import Inputs, packed_inputs
from simulated_gradients import check
from simulated_launch import Plant
from simulated_values import ProgramError

from maskattn.kernels.gluon.configs import GradientConfig

ARRIVE, WAIT = "mbarrier.arrive(rooms.ready, count=1)", "mbarrier.wait(rooms.ready, step & 1)"
STEP_WAIT = "dq, dv = hopper.warpgroup_mma_wait(1, deps=(dq, dv))"
LAST_WAIT = "dk = hopper.warpgroup_mma_wait(0, deps=(dk,))"
HAND_BACK = "hand_back(rooms.q, block, True, STAGES)"
READY = "mbarrier.init(ready, count=2)"
BYTES = "q_desc.block_type.nbytes + TERMS * terms_desc.block_type.nbytes"
ADD = "add_to_global(dq_desc, [step * 128 + 64 * CONSUMER, 0], dq_rows)"
FENCE = "hopper.fence_async_shared()"

PLANTS: dict[str, tuple[Plant, ...]] = {
    # Barriers and phases.
    "a consumer does not wait for the other's dS": (("differentiate_block", WAIT, "pass"),),
    "a consumer waits for the wrong phase of dS": (("differentiate_block", "step & 1", "step & 1 ^ 1"),),
    "a consumer says too early that its dS is there": (
        ("differentiate_block", ARRIVE, "pass"),
        ("differentiate_block", "narrow = back.product", f"if ENDS_STEP: {ARRIVE}\n    narrow = back.product"),
    ),
    "one consumer is enough for dS": (("gluon_gradient_kernel", READY, READY.replace("2", "1")),),
    "the barrier of dS is not made": (("gluon_gradient_kernel", READY, "pass"),),
    "the producer does not wait for an empty stage": (
        ("fetch_query_block", "mbarrier.wait(rooms.q.empty.index(stage), parity ^ 1)", "pass"),
    ),
    "the terms of the queries are not expected": (("fetch_query_block", BYTES, "q_desc.block_type.nbytes"),),
    "the queries are handed back before they are read": (
        ("differentiate_block", HAND_BACK, "pass"),
        ("differentiate_block", "narrow = back.product", f"{HAND_BACK}; narrow = back.product"),
    ),
    "the queries are not handed back": (("differentiate_block", HAND_BACK, "pass"),),
    # Stages and rooms.
    "dS of two blocks has one room": (("room_of", "block % (2 * BLOCKS)", "block % BLOCKS"),),
    "a term of another stage is read": (("load_row_term", "block % STAGES", "(block + 1) % STAGES"),),
    "the terms are a block late": (("fetch_query_block", "block % BLOCKS * 64", "(block + 1) % BLOCKS * 64"),),
    # Products and fences.
    "dQ is read before it is waited for": (("differentiate_block", STEP_WAIT, STEP_WAIT.replace("(1", "(2")),),
    "dK is read before it is waited for": (("differentiate_block", LAST_WAIT, LAST_WAIT.replace("(0", "(1")),),
    "dS is written without a fence": (("differentiate_block", FENCE, "pass"),),
    "dQ is written without a fence": (("add_query_gradient", FENCE, "pass"),),
    # The sum of dQ.
    "dQ is not added": (("add_query_gradient", ADD, "pass"),),
    "dQ is written while it is being added": (("add_query_gradient", "tma.store_wait(0)", "pass"),),
    "the last dQ is not waited for": (("differentiate_keys", "tma.store_wait(0)", "pass"),),
    "both consumers add the same rows": (("add_query_gradient", "64 * CONSUMER, 0]", "0, 0]"),),
    "a consumer multiplies the other's rows": (("multiply_keys", "step * 2 + CONSUMER", "step * 2 + 1 - CONSUMER"),),
    "dQ has the keys of one consumer twice": (("multiply_keys", "rooms.k.rows.index(half)", "rooms.k.rows.index(0)"),),
    # Bounds.
    "keys past the end are not masked": (("differentiate_scores", "[:, None], p, 0.0", "[:, None], p, p"),),
    "the mask has a key too many": (("differentiate_keys", "keys < keys_left", "keys <= keys_left"),),
    "a descriptor of dQ is a row too long": (("describe_query_gradient", "gl.maximum(length, 1)", "length + 1"),),
    "two sequences share the terms of a step": (("first_row_step", "+ sequence", ""),),
    "both consumers have the same keys": (("gluon_gradient_kernel", "HEAD, 1, BLOCKS", "HEAD, 0, BLOCKS"),),
}  # fmt: skip

LENGTHS_Q, LENGTHS_K = [90, 256, 131], [200, 97, 150]
CONFIG = GradientConfig(2, 2)


@pytest.fixture
def inputs() -> Inputs:
    """With more blocks than stages, more tiles of keys than one, and weights that overflow past the end."""
    found = packed_inputs(LENGTHS_Q, LENGTHS_K, heads=1, head_width=16, dtype=torch.float16, bias="shared")
    found.key_bias.sub_(200)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_without_a_fault_the_same_calls_are_within_the_budget(seed, inputs):
    check(inputs, LENGTHS_Q, LENGTHS_K, CONFIG, seed)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_seen(name, inputs):
    with pytest.raises((ProgramError, AssertionError)):  # noqa: PT012 (whichever turns show it)
        for seed in range(6):
            check(inputs, LENGTHS_Q, LENGTHS_K, CONFIG, seed, *PLANTS[name])


def test_a_consumer_that_multiplies_the_others_columns_is_seen():
    inputs = packed_inputs([70], heads=1, head_width=128, dtype=torch.float16)
    check(inputs, [70], [70], GradientConfig(1, 2))
    plant = "multiply_keys", "COLUMNS * CONSUMER, COLUMNS, 1", "COLUMNS * (1 - CONSUMER), COLUMNS, 1"
    with pytest.raises((ProgramError, AssertionError)):
        check(inputs, [70], [70], GradientConfig(1, 2), 0, plant)
