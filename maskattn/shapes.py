"""Shape annotations: jaxtyping's where it is installed, the bare array type where it is not.

``Float[Tensor, "T H D"]`` documents and, under the tests, checks dtype family and shape. The core needs torch and
numpy alone, so without jaxtyping the subscript gives back its first argument.
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
