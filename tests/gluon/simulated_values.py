"""What a simulated program computes with: numbers and tiles in the dtypes that they have on the device, and pointers.

Integers must not overflow, and nothing outside a tensor's memory is read or written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["ProgramError", "Pointer", "Value", "in_dtype", "tensor_of"]


class ProgramError(AssertionError):
    """What hardware would answer with wrong numbers, a crash or a program that never ends."""


class Value:
    """A number (no axes) or a tile."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"Value({self.data})"

    def __bool__(self) -> bool:
        assert self.data.ndim == 0, "a program can only decide by a number"
        return bool(self.data)

    def __index__(self) -> int:
        assert self.data.ndim == 0, "only a number counts"
        return int(self.data)

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index])

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    __hash__ = None  # == makes a tile


def tensor_of(x: Any, like: torch.dtype | None = None) -> Tensor:
    """Of a value, or of a number in Python, which takes the dtype that it meets where it can."""
    if isinstance(x, Value):
        return x.data
    if like is not None and (like.is_floating_point or not isinstance(x, float)):
        return torch.tensor(x, dtype=like)
    if isinstance(x, bool):
        return torch.tensor(x)
    return torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else torch.int32)


def _meet(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    left, right = (tensor_of(x, y.dtype if isinstance(y, Value) else None) for x, y in ((a, b), (b, a)))
    # As scalars count on the device, which do not give way to a tile's dtype.
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def in_dtype(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """An integer result of 64 bits in the dtype that it has on the device."""
    narrow = wide.to(dtype)
    if not torch.equal(narrow.long(), wide.long()):
        raise ProgramError(f"a result does not fit into {dtype}: {wide.abs().max()}")
    return narrow


def _arithmetic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(b, Pointer):
            return NotImplemented
        left, right = _meet(a, b)
        if left.dtype in (torch.int32, torch.int64):
            return Value(in_dtype(function(left.long(), right.long()), left.dtype))
        return Value(function(left, right))

    return apply


def _comparison(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    return lambda a, b: Value(function(*_meet(a, b)))


def _turned(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


for _name, _function in {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": _quotient,
    "mod": torch.fmod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}.items():
    setattr(Value, f"__{_name}__", _arithmetic(_function))
    setattr(Value, f"__r{_name}__", _turned(_arithmetic(_function)))
Value.__truediv__ = lambda self, other: Value(operator.truediv(*_meet(self, other)))
Value.__rtruediv__ = lambda self, other: Value(operator.truediv(*_meet(other, self)))
Value.__neg__ = lambda self: Value(-self.data)
Value.__invert__ = lambda self: Value(~self.data)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _comparison(getattr(operator, _name)))


@dataclass(frozen=True)
class _PointerType:
    element_ty: torch.dtype


@dataclass(frozen=True, eq=False)
class Pointer:
    """Places in a tensor's memory: its elements, and an offset for each place."""

    memory: Tensor
    offsets: Tensor = field(default_factory=lambda: torch.tensor(0))

    @staticmethod
    def of(x: Tensor) -> Pointer:
        """To the first element of a tensor, in all of its memory."""
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return Pointer(memory, torch.tensor(x.storage_offset()))

    @property
    def dtype(self) -> _PointerType:
        return _PointerType(self.memory.dtype)

    @property
    def address(self) -> int:
        """Of the one place that this is."""
        return self.memory.data_ptr() + int(self.offsets) * self.memory.element_size()

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + tensor_of(other).long())

    __radd__ = __add__

    def load(self, mask: Any = None, other: Any = 0.0) -> Value:
        """What lies there; ``other`` where the mask says no."""
        inside = self._checked(mask, "read")
        fill = torch.tensor(float("nan") if other is None else other).to(self.memory.dtype)
        safe = self.offsets.where(inside, torch.tensor(0))
        found = self.memory[safe] if self.memory.numel() else fill.expand(safe.shape)
        return Value(found.where(inside, fill))

    def store(self, value: Any, mask: Any = None) -> None:
        """Write where the mask says so."""
        data = tensor_of(value).to(self.memory.dtype).broadcast_to(self.offsets.shape)
        inside = self._checked(mask, "write")
        self.memory[self.offsets[inside]] = data[inside]

    def _checked(self, mask: Any, verb: str) -> Tensor:
        inside = torch.tensor(True) if mask is None else tensor_of(mask)
        inside = inside.broadcast_to(self.offsets.shape)
        outside = inside & ((self.offsets < 0) | (self.offsets >= self.memory.numel()))
        if outside.any():
            raise ProgramError(f"a program would {verb} outside a tensor of {self.memory.numel()} elements")
        return inside
