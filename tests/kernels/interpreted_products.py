"""Products of float32 in Triton's interpreter, rounded alike whichever operand comes first, as on a GPU.

A backward pass recomputes as k·qᵀ the scores that forward computed as q·kᵀ. A GPU adds up both along the head, in one
order; NumPy's matrix product adds in orders that depend on the processor, so that large scores differ by several
roundings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter

__all__ = ["sum_in_float64"]


def sum_in_float64() -> None:
    """Let this process's interpreter add up products of float32 in float64 and round the sum once."""
    builder: Any = interpreter.InterpreterBuilder
    plain = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
            return plain(self, a, b, d, *how)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
