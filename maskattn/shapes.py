"""Shape annotations: jaxtyping's if it has been imported, otherwise the bare array type.

``Float[Tensor, "T H D"]`` documents dtype family and shape, and the tests check them; they import jaxtyping first.
Nothing else pays for its import: there the subscript returns its first argument.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "Float", "Int", "Shaped", "UInt8"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Shaped, UInt8
else:

    class _ArrayType:
        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Float = Int = Shaped = UInt8 = _ArrayType
