"""Shape annotations: jaxtyping's if it is installed, otherwise the bare array type.

``Float[Tensor, "T H D"]`` documents dtype family and shape, and the tests check them. The core needs only torch and
numpy, so without jaxtyping the subscript returns its first argument.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "Float", "Int", "Shaped", "UInt8"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, Shaped, UInt8
    except ModuleNotFoundError:

        class _ArrayType:
            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = Shaped = UInt8 = _ArrayType
