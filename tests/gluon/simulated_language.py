"""The subset of Gluon and of Triton's language that the kernels use, as functions on simulated values.

Layouts are not simulated: the compiler checks them. Nor is what it adds itself, the barriers between warps of one
partition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from simulated_machine import Addition, Barrier, Copy, Machine, Product, Shared
from simulated_values import Pointer, ProgramError, Value, in_dtype, tensor_of
from torch import Tensor
from triton.experimental.gluon import language as gl

__all__ = ["HOPPER", "LANGUAGE", "MBARRIER", "TMA", "add_to_global", "program"]


class program:  # noqa: N801 (reads as a statement)
    """A program under way: its machine and its number of how many."""

    now: Any = None

    def __init__(self, machine: Machine, number: int, count: int) -> None:
        self.machine, self.number, self.count = machine, number, count

    def __enter__(self) -> None:
        program.now = self

    def __exit__(self, *_: object) -> None:
        program.now = None


def machine() -> Machine:
    return program.now.machine


# Numbers and tiles.


def arange(start: int, end: int, layout: Any = None) -> Value:
    return Value(torch.arange(start, end, dtype=torch.int32))


def full(shape: Any, value: Any, dtype: torch.dtype, layout: Any = None) -> Value:
    return Value(tensor_of(value).to(dtype).expand(*shape).clone() if shape else tensor_of(value).to(dtype))


def zeros(shape: Any, dtype: torch.dtype, layout: Any = None) -> Value:
    return full(shape, 0, dtype)


def cast(x: Any, dtype: torch.dtype, bitcast: bool = False) -> Value:
    data = tensor_of(x)
    return Value(data.view(dtype) if bitcast else data.to(dtype))


def where(condition: Any, a: Any, b: Any) -> Value:
    left = tensor_of(a, b.dtype if isinstance(b, Value) else None)
    right = tensor_of(b, left.dtype)
    return Value(torch.where(tensor_of(condition), left, right))


def maximum(a: Any, b: Any) -> Value:
    # As on the device, a number is larger than NaN.
    left = tensor_of(a, b.dtype if isinstance(b, Value) else None)
    return Value(torch.fmax(left, tensor_of(b, left.dtype)))


def minimum(a: Any, b: Any) -> Value:
    left = tensor_of(a, b.dtype if isinstance(b, Value) else None)
    return Value(torch.fmin(left, tensor_of(b, left.dtype)))


def largest(x: Value, axis: int) -> Value:
    return Value(x.data.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")).amax(axis))


def total(x: Value, axis: int) -> Value:
    if x.dtype == torch.int32:
        return Value(in_dtype(x.data.sum(axis), x.dtype))
    return Value(x.data.sum(axis))


def loop(*bounds: Any, **_: Any) -> Iterator[Value]:
    return (Value(torch.tensor(i, dtype=torch.int32)) for i in range(*(int(x) for x in bounds)))


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
    return pointer.load(mask, other)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    pointer.store(value, mask)


def dot(a: Value, b: Value, before: Value | None = None, input_precision: str = "ieee") -> Value:
    product = a.data.float() @ b.data.float()
    return Value(product if before is None else before.data + product)


# Shared memory.


class View:
    """A kernel's handle of shared memory, or of barriers."""

    def __init__(self, shared: Shared, key: tuple[int, int] = (0, 0)) -> None:
        self.shared, self.key = shared, key

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.shared.data.shape)

    def index(self, position: Any) -> View:
        place = int(position)
        if not 0 <= place < self.shape[0]:
            raise ProgramError(f"part {place} of shared memory with {self.shape[0]} parts")
        return View(self.shared.part(lambda x: x[place]), (self.key[0], place))

    def permute(self, order: tuple[int, ...]) -> View:
        return View(self.shared.part(lambda x: x.permute(order)), self.key)

    def slice(self, start: int, length: int, dim: int = 0) -> View:
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise ProgramError(f"elements {start} to {start + length} of shared memory with {self.shape[dim]}")
        return View(self.shared.part(lambda x: x.narrow(dim, start, length)), self.key)

    def store(self, value: Value) -> None:
        machine().pause()
        self.shared.about_to_be_written()
        assert (value.dtype, value.shape) == (self.dtype, self.shape)
        self.shared.data.copy_(value.data)
        self.shared.unfenced.fill_(True)
        machine().current.stores.append(self.shared)

    def load(self, layout: Any) -> Value:
        machine().pause()
        return Value(self.shared.data.clone())

    @property
    def barrier(self) -> Barrier:
        found = machine().barriers.get(self.key)
        if found is None:
            raise ProgramError("a barrier is used before it is made")
        return found


def allocate_shared_memory(dtype: torch.dtype, shape: Any, layout: Any) -> View:
    allocated = Shared.allocate(dtype, shape)
    # Kept, so that no other allocation has its number.
    machine().__dict__.setdefault("kept", []).append(allocated)
    return View(allocated, (id(allocated), 0))


def fence_async_shared() -> None:
    for shared in machine().current.stores:
        shared.unfenced.fill_(False)
    machine().current.stores.clear()


# Barriers and the copy engine.


def init(barrier: View, count: int) -> None:
    machine().barriers[barrier.key] = Barrier(count)


def expect(barrier: View, size: int, pred: Any = True) -> None:
    if bool(pred):
        machine().pause()
        barrier.barrier.expect(int(size))


def arrive(barrier: View, count: int = 1, pred: Any = True) -> None:
    if bool(pred):
        machine().pause()
        barrier.barrier.arrive(count)


def wait(barrier: View, parity: Any, pred: Any = True) -> None:
    if bool(pred):
        waited, bit = barrier.barrier, int(parity)
        machine().pause(
            lambda: waited.has_passed(bit),
            f"parity {bit} of a barrier of {waited.count} in phase {waited.phase}, {waited.missing} arrivals missing",
        )
        waited.unseen = 0


class Descriptor:
    """Rows of memory as the copy engine reads them."""

    def __init__(self, base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any = None) -> None:
        self.base, self.shape = base, [int(x) for x in shape]
        self.strides = [int(x) for x in strides]
        self.block_shape = list(block_shape)
        size = base.memory.element_size()
        apart = any(stride * size % 16 for stride in self.strides[:-1])
        if base.address % 16 or apart or self.strides[-1] != 1 or min(self.shape) < 1:
            raise ProgramError(
                f"no descriptor can have shape {self.shape}, strides {self.strides}, address {base.address}"
            )
        self.layout = None

    @property
    def dtype(self) -> torch.dtype:
        return self.base.memory.dtype

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=math.prod(self.block_shape) * self.base.memory.element_size())

    def load(self, place: Any) -> Value:
        return Value(self.read(place))

    def read(self, place: Any) -> Tensor:
        """A block; what lies outside the descriptor's shape is 0."""
        pointers, inside = self._block(place)
        return pointers.load(inside, 0.0).data

    def add(self, place: Any, block: Tensor) -> None:
        """Add a block to what lies inside the descriptor's shape."""
        pointers, inside = self._block(place)
        pointers.store(Value(pointers.load(inside, 0.0).data + block), inside)

    def _block(self, place: Any) -> tuple[Pointer, Value]:
        """The places of a block, and which of them are inside the descriptor's shape."""
        offsets, inside = torch.tensor(0), torch.tensor(True)
        for x, count, length, stride in zip(place, self.block_shape, self.shape, self.strides, strict=True):
            along = int(x) + torch.arange(count)
            offsets = offsets[..., None] + along * stride
            inside = inside[..., None] & (along >= 0) & (along < length)
        return self.base + Value(offsets), Value(inside)


def async_copy_global_to_shared(desc: Descriptor, place: Any, barrier: View, target: View, pred: Any = True) -> None:
    if not bool(pred):
        return
    machine().pause()
    target.shared.about_to_be_written()
    if target.shared.unfenced.any():
        raise ProgramError("the copy engine writes where threads wrote without a fence since")
    assert target.shape == desc.block_shape
    target.shared.data.fill_(float("nan"))
    machine().copies.append(Copy(desc.read(place), target.shared, barrier.barrier))


def add_to_global(desc: Descriptor, place: Any, source: View) -> None:
    machine().pause()
    if source.shared.unfenced.any():
        raise ProgramError("the copy engine reads what threads wrote without a fence since")
    assert (source.shape, source.dtype) == (desc.block_shape, desc.dtype)
    source.shared.readers.add_(1)
    place = [int(x) for x in place]
    addition = Addition(source.shared, lambda block: desc.add(place, block))
    machine().copies.append(addition)
    machine().current.additions.append(addition)


def store_wait(pending: int) -> None:
    additions = machine().current.additions

    def under_way() -> int:
        return sum(not x.is_done for x in additions)

    machine().pause(lambda: under_way() <= pending, f"{under_way()} additions, of which {pending} may be under way")


# Products of a warp group.


def warpgroup_mma(a: Any, b: View, before: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    machine().pause()
    left = a.shared if isinstance(a, View) else a
    product = Product(left, b.shared, before if use_acc else None, (left.data.shape[0], b.shape[1]))
    assert left.data.shape[0] == 64, "rows of a warp group's product"
    assert left.data.shape[1] == b.shape[0], "columns on the left and rows on the right"
    assert left.data.dtype == b.dtype, "one dtype"
    for operand in product.operands:
        if operand.unfenced.any():
            raise ProgramError("a product reads what threads wrote without a fence since")
        operand.readers.add_(1)
    machine().current.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(pending: int, deps: Any) -> Any:
    machine().pause()
    products = machine().current.products
    while len(products) > pending:
        products.pop(0).finish()
    results = tuple(_result_of(x) for x in deps)
    return results[0] if len(results) == 1 else results


def _result_of(x: Any) -> Any:
    if not isinstance(x, Product):
        return x
    return Value(torch.full(x.shape, float("nan")) if x.result is None else x.result)


def warp_specialize(partitions: Any, warps: Any, registers: Any = None) -> None:
    assert len(partitions) == len(warps) + 1
    machine().run([lambda f=f, args=args: f(*args) for f, args in partitions])


_DTYPES = ("float16", "bfloat16", "float32", "int32", "int64", "uint32", "uint64", "int1")

LANGUAGE = SimpleNamespace(
    **{name: getattr(torch, "bool" if name == "int1" else name) for name in _DTYPES},
    **{name: getattr(gl, name) for name in ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout")},
    BlockedLayout=gl.BlockedLayout,
    NVMMASharedLayout=SimpleNamespace(get_default_for=lambda shape, dtype: None),
    constexpr=lambda x: x,
    arange=arange,
    full=full,
    zeros=zeros,
    cast=cast,
    where=where,
    maximum=maximum,
    minimum=minimum,
    max=largest,
    sum=total,
    exp2=lambda x: Value(torch.exp2(tensor_of(x))),
    log=lambda x: Value(torch.log(tensor_of(x))),
    sqrt=lambda x: Value(torch.sqrt(tensor_of(x))),
    cdiv=lambda a, b: (a + (b - 1)) // b,
    expand_dims=lambda x, axis: Value(x.data.unsqueeze(axis)),
    trans=lambda x: Value(x.data.T),
    convert_layout=lambda x, layout: x,
    range=loop,
    static_range=range,
    load=load,
    store=store,
    dot=dot,
    program_id=lambda axis: Value(torch.tensor(program.now.number, dtype=torch.int32)),
    num_programs=lambda axis: Value(torch.tensor(program.now.count, dtype=torch.int32)),
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
    make_tensor_descriptor=Descriptor,
)
MBARRIER = SimpleNamespace(init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=lambda: None)
TMA = SimpleNamespace(
    make_tensor_descriptor=Descriptor,
    async_copy_global_to_shared=async_copy_global_to_shared,
    store_wait=store_wait,
)
HOPPER = SimpleNamespace(
    mbarrier=MBARRIER,
    tma=TMA,
    fence_async_shared=fence_async_shared,
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
    warpgroup_mma_init=lambda x: x,
)
