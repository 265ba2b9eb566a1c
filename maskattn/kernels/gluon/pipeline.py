"""The transfer of keys and values to the consumers: buffers in shared memory, and the barriers that guard them.

A block of keys occupies one *stage*: a buffer, a barrier ``full`` that completes once the copy engine has written all
its bytes, and a barrier ``empty`` that completes once every consumer has read it. A stage serves the blocks ``stage``,
``stage + STAGES`` and so on; the parity of its barriers, which flips from one to the next, distinguishes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

__all__ = [
    "Ring",
    "describe_rows",
    "fetch_block",
    "fetch_blocks",
    "hand_back",
    "make_ring",
    "stage_of",
    "wait_for_block",
]


class Ring(NamedTuple):
    """The stages of the keys or of the values: rows [STAGES, N, D], and the two barriers of each stage."""

    rows: Any
    full: Any
    empty: Any


@gluon.jit
def make_ring(
    DTYPE: gl.constexpr,
    PADDED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """Allocate a ring of empty stages for blocks [N, D]."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, PADDED], DTYPE)
    rows = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, PADDED], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return Ring(rows, full, empty)


@gluon.jit
def stage_of(block, STAGES: gl.constexpr):
    """Return the stage of a block, and the parity of its barriers while this block is awaited."""
    return block % STAGES, (block // STAGES) & 1


@gluon.jit
def describe_rows(base_ptr, length, stride_t, ring, HEAD: gl.constexpr):
    """Make the descriptor of the rows of one sequence and head; elements past its end, or past D, are read as 0."""
    N: gl.constexpr = ring.rows.shape[1]
    PADDED: gl.constexpr = ring.rows.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, PADDED], ring.rows.dtype)
    # A descriptor may not be empty.
    return tma.make_tensor_descriptor(base_ptr, [gl.maximum(length, 1), HEAD], [stride_t, 1], [N, PADDED], LAYOUT)


@gluon.jit
def fetch_block(desc, ring, block, is_there, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Have the copy engine write a block into its stage once that is empty; rows past the descriptor's bound are 0."""
    stage, parity = stage_of(block, STAGES)
    # The parity before the first use counts as complete, so that stages start empty.
    mbarrier.wait(ring.empty.index(stage), parity ^ 1, pred=is_there)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes, pred=is_there)
    tma.async_copy_global_to_shared(
        desc, [block * BLOCK_N, 0], ring.full.index(stage), ring.rows.index(stage), pred=is_there
    )


@gluon.jit
def fetch_blocks(
    k_base_ptr,
    v_base_ptr,
    k_stride_t,
    v_stride_t,
    k_length,
    k_ring,
    v_ring,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Run the producer: fetch all blocks in the order in which they are consumed, keys one block ahead of values."""
    # Made by the warp that uses them: only the warp that makes a descriptor may rely on the copy engine seeing it.
    k_desc = describe_rows(k_base_ptr, k_length, k_stride_t, k_ring, HEAD)
    v_desc = describe_rows(v_base_ptr, k_length, v_stride_t, v_ring, HEAD)
    blocks = (k_length + BLOCK_N - 1) // BLOCK_N
    fetch_block(k_desc, k_ring, 0, blocks > 0, BLOCK_N, STAGES)
    for block in range(blocks):
        fetch_block(k_desc, k_ring, block + 1, block + 1 < blocks, BLOCK_N, STAGES)
        fetch_block(v_desc, v_ring, block, True, BLOCK_N, STAGES)


@gluon.jit
def wait_for_block(ring, block, STAGES: gl.constexpr):
    """Wait for a block and return its rows, [N, D] in shared memory."""
    stage, parity = stage_of(block, STAGES)
    mbarrier.wait(ring.full.index(stage), parity)
    return ring.rows.index(stage)


@gluon.jit
def hand_back(ring, block, was_read, STAGES: gl.constexpr):
    """Signal that this consumer has read a block."""
    mbarrier.arrive(ring.empty.index(block % STAGES), count=1, pred=was_read)
