"""How keys and values come to the consumers: buffers in shared memory, and the barriers that hand them over.

Of a block of keys there is one *stage*: room for it, a barrier ``full`` that completes once the copy engine has written
all its bytes, and a barrier ``empty`` that completes once every consumer has read it. A stage serves the blocks
``stage``, ``stage + STAGES`` and so on; which of them a barrier speaks of is told by its parity, which turns each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

__all__ = ["Ring", "fetch_blocks", "hand_back", "make_ring", "wait_for_block"]


class Ring(NamedTuple):
    """The stages of the keys, or of the values: rows [STAGES, N, D], and the two barriers of each."""

    rows: Any
    full: Any
    empty: Any


@gluon.jit
def make_ring(desc, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring of empty stages for the blocks that a descriptor reads."""
    rows = gl.allocate_shared_memory(desc.dtype, [STAGES, desc.block_shape[0], desc.block_shape[1]], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return Ring(rows, full, empty)


@gluon.jit
def stage_of(block, STAGES: gl.constexpr):
    """The stage of a block, and the parity that its barriers have while this block is awaited."""
    return block % STAGES, (block // STAGES) & 1


@gluon.jit
def fetch_block(desc, ring, block, is_there, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Have the copy engine write a block into its stage once that is empty; rows past the descriptor's bound are 0."""
    stage, parity = stage_of(block, STAGES)
    # The parity before the first turn counts as complete, so that stages begin empty.
    mbarrier.wait(ring.empty.index(stage), parity ^ 1, pred=is_there)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes, pred=is_there)
    tma.async_copy_global_to_shared(
        desc, [block * BLOCK_N, 0], ring.full.index(stage), ring.rows.index(stage), pred=is_there
    )


@gluon.jit
def fetch_blocks(k_desc, v_desc, k_ring, v_ring, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """The producer: all blocks in the order in which the consumers need them, keys one block ahead of values."""
    fetch_block(k_desc, k_ring, 0, blocks > 0, BLOCK_N, STAGES)
    for block in range(blocks):
        fetch_block(k_desc, k_ring, block + 1, block + 1 < blocks, BLOCK_N, STAGES)
        fetch_block(v_desc, v_ring, block, True, BLOCK_N, STAGES)


@gluon.jit
def wait_for_block(ring, block, STAGES: gl.constexpr):
    """The rows of a block, once they are there: [N, D] in shared memory."""
    stage, parity = stage_of(block, STAGES)
    mbarrier.wait(ring.full.index(stage), parity)
    return ring.rows.index(stage)


@gluon.jit
def hand_back(ring, block, was_read, STAGES: gl.constexpr):
    """Say that this consumer has read a block."""
    mbarrier.arrive(ring.empty.index(block % STAGES), count=1, pred=was_read)
