"""The addition of a block in shared memory to global memory by the copy engine (TMA's reduce-add).

Gluon in triton 3.7 has no function for it, but its compiler has the operation, which this module calls as Gluon's own
functions call theirs. Such additions come in any order, so that float sums of several blocks differ in their last bits
from run to run.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin

__all__ = ["add_to_global"]


@builtin
def add_to_global(desc: Any, position: Any, source: Any, _semantic: Any = None) -> None:
    """Begin to add ``source``, a block in shared memory, to the memory that a descriptor covers.

    What lies outside the descriptor's shape is left alone. ``source`` has to be fenced before
    (``hopper.fence_async_shared``), and may be written again after ``tma.store_wait``.

    Args:
        desc: the descriptor, of the dtype, block shape and layout of ``source``.
        position: the coordinates of the block's first element.
        source: the block in shared memory.
    """
    coordinates = _semantic._convert_to_ir_values(position, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, desc.handle, coordinates, source.handle)
