"""The parts of a multiprocessor that work side by side: warps by partitions, the copy engine, barriers, shared memory.

Partitions take turns by chance, at every operation that another could notice. What the copy engine brings is NaN from
the moment that it is asked for until it arrives, which may be late. Products are done when they are waited for, so that
what changes under them shows.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from simulated_values import ProgramError, Value
from torch import Tensor

__all__ = ["Addition", "Barrier", "Copy", "Machine", "Product", "Shared"]


class _StoppedError(Exception):
    """Another partition has failed."""


@dataclass
class Barrier:
    """An mbarrier: the phase ends once all arrivals and all bytes have come."""

    count: int
    phase: int = 0
    missing: int = field(init=False)
    bytes: int = 0
    unseen: int = 0

    def __post_init__(self) -> None:
        self.missing = self.count

    def arrive(self, count: int) -> None:
        if count > self.missing:
            raise ProgramError(f"{count} arrivals where a barrier of {self.count} waits for {self.missing}")
        self.missing -= count
        self._turn()

    def expect(self, size: int) -> None:
        self.bytes += size
        self.arrive(1)

    def complete(self, size: int) -> None:
        self.bytes -= size
        self.unseen += 1
        self._turn()

    def has_passed(self, parity: int) -> bool:
        return self.phase & 1 != parity & 1

    def _turn(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count


@dataclass
class Shared:
    """Shared memory, or a part of it: the elements, and what is known of each by whoever has a part."""

    data: Tensor
    # Of each element: products that are about to read it, and whether threads wrote it without a fence since.
    readers: Tensor
    unfenced: Tensor

    @staticmethod
    def allocate(dtype: torch.dtype, shape: Sequence[int]) -> Shared:
        data = torch.full(tuple(shape), float("nan")).to(dtype) if dtype.is_floating_point else torch.empty(*shape)
        return Shared(data, torch.zeros(data.shape, dtype=torch.int16), torch.zeros(data.shape, dtype=torch.bool))

    def part(self, cut: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(cut(self.data), cut(self.readers), cut(self.unfenced))

    def about_to_be_written(self) -> None:
        if self.readers.any():
            raise ProgramError("shared memory is written while a copy or a product that was not waited for reads it")


@dataclass(eq=False)
class Copy:
    """A block on its way from memory to shared memory."""

    source: Tensor
    target: Shared
    barrier: Barrier

    def arrive(self) -> None:
        self.target.data.copy_(self.source)
        self.barrier.complete(self.source.numel() * self.source.element_size())


@dataclass(eq=False)
class Addition:
    """A block in shared memory on its way to be added to memory, as ``add`` does it; it is read when it arrives."""

    source: Shared
    add: Callable[[Tensor], None]
    is_done: bool = False

    def arrive(self) -> None:
        self.add(self.source.data)
        self.source.readers.sub_(1)
        self.is_done = True


@dataclass(eq=False)
class Product:
    """A product of a warp group that was begun: left (registers or shared memory) @ right + before."""

    left: Value | Shared
    right: Shared
    before: Value | Product | None
    shape: tuple[int, int]
    result: Tensor | None = None

    def finish(self) -> None:
        self.result = self.left.data.float() @ self.right.data.float()
        if self.before is not None:
            before = self.before.result if isinstance(self.before, Product) else self.before.data
            assert before is not None, "products of one partition finish in the order in which they began"
            self.result += before
        for each in self.operands:
            each.readers.sub_(1)

    @property
    def operands(self) -> list[Shared]:
        return [x for x in (self.left, self.right) if isinstance(x, Shared)]


class _Partition:
    """Some warps with a program of their own."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.body = body
        self.go = threading.Event()
        self.can_go: Callable[[], bool] | None = None
        self.why = ""
        self.products: list[Product] = []
        self.stores: list[Shared] = []
        self.additions: list[Addition] = []
        self.is_done = False
        self.error: BaseException | None = None


class Machine:
    """One program's share of a multiprocessor; ``seed`` decides who goes first, and how late copies come."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.eagerness = self.chance.choice([0.0, 0.1, 0.9])
        # How likely whoever works goes on working, so that others fall far behind.
        self.patience = self.chance.choice([0.0, 0.5, 0.97])
        self.barriers: dict[int, Barrier] = {}
        self.copies: list[Copy | Addition] = []
        self.alone = self.current = _Partition(lambda: None)
        self.partitions: list[_Partition] = []
        self._back = threading.Event()
        self._stopping = False

    def run(self, bodies: Sequence[Callable[[], Any]]) -> None:
        """Run partitions side by side until all are done."""
        self.partitions = [_Partition(body) for body in bodies]
        threads = [threading.Thread(target=self._live, args=(x,), daemon=True) for x in self.partitions]
        for thread in threads:
            thread.start()
        error = self._take_turns()
        self._stopping = True
        for partition, thread in zip(self.partitions, threads, strict=True):
            partition.go.set()
            thread.join()
        self.current = self.alone
        if error is not None:
            raise error

    def end(self) -> None:
        """Whether a program may end as things are."""
        if any(isinstance(x, Addition) for x in self.copies):
            raise ProgramError("a program ends while a block that it adds to memory is read")
        if self.copies or any(barrier.unseen for barrier in self.barriers.values()):
            raise ProgramError("a program ends while a block that nobody waited for is under way")
        if any(partition.products for partition in [self.alone, *self.partitions]):
            raise ProgramError("a program ends while a product that was not waited for is under way")

    def pause(self, can_go: Callable[[], bool] | None = None, why: str = "") -> None:
        """Let others work until this partition's turn comes again, and ``can_go`` says yes."""
        partition = self.current
        if partition is self.alone:
            while can_go is not None and not can_go():
                if not self.copies:
                    raise ProgramError(f"deadlock: {why}")
                self._deliver()
            return
        partition.can_go, partition.why = can_go, why
        partition.go.clear()
        self._back.set()
        partition.go.wait()
        if self._stopping:
            raise _StoppedError

    def _live(self, partition: _Partition) -> None:
        partition.go.wait()
        try:
            if not self._stopping:
                partition.body()
        except _StoppedError:
            pass
        except BaseException as error:  # it is the caller's
            partition.error = error
        partition.is_done = True
        self._back.set()

    def _take_turns(self) -> BaseException | None:
        while True:
            waiting = [x for x in self.partitions if not x.is_done]
            if not waiting:
                return None
            able = [x for x in waiting if x.can_go is None or x.can_go()]
            if self.copies and (not able or self.chance.random() < self.eagerness):
                self._deliver()
                continue
            if not able:
                return ProgramError(f"deadlock: {'; '.join(x.why for x in waiting)}")
            if self.current not in able or self.chance.random() >= self.patience:
                self.current = self.chance.choice(able)
            self._back.clear()
            self.current.go.set()
            self._back.wait()
            if self.current.error is not None:
                return self.current.error

    def _deliver(self) -> None:
        self.copies.pop(self.chance.randrange(len(self.copies))).arrive()
