"""How long calls of the Triton kernels keep the host, on a simulated GPU on which nothing runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import maskattn
from bench.aot.autograd_floor import allocate, allocate_with_gradients

__all__ = ["print_host_time"]

HEADS, WIDTH, LONGEST = 6, 64, 64


def print_host_time() -> None:
    """Print host times of the operations, forward and with gradients, in bfloat16 with head width 64.

    torch's share: a call that only allocates its results, and an autograd function of q, k and v that does no more. The
    results of masked attention are filled by torch in addition, here on the CPU.
    """
    torch.set_num_threads(1)
    for lengths in ((64,), (64,) * 4, (50, 64, 14)):
        taken = []
        for name, call, leaves in _calls(lengths):
            with torch.no_grad():
                taken.append(f"{name} {_microseconds(call):.0f} µs")
            taken.append(f"with gradients {_microseconds(_with_gradients(call, leaves)):.0f} µs")
        print(f"{len(lengths)} sequences: {', '.join(taken)}")


def _calls(lengths: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Tensor], tuple[Tensor, ...]]]:
    """Yield calls by name, and what they learn: of packed tokens, or of dense ones of which as many are kept."""
    batch, starts = len(lengths), torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    keep = torch.arange(LONGEST) < torch.tensor(lengths)[:, None]
    packing = maskattn.Packing.from_keep(keep)
    q, k, v = packed = _leaves(sum(lengths), HEADS, WIDTH)
    dense = _leaves(batch, HEADS, LONGEST, WIDTH)
    first = q.detach()[:batch, None].clone().requires_grad_()

    def attend() -> Tensor:
        return maskattn.packed_attention(q, k, v, packing, impl="triton")

    def attend_masked() -> Tensor:
        return maskattn.masked_attention(*dense, keep, impl="triton")

    def read() -> Tensor:
        found = maskattn.readout(first, k, v, starts, max(lengths), impl="triton")
        assert isinstance(found, Tensor)
        return found

    def do_nothing() -> Tensor:
        return allocate_with_gradients(*packed) if torch.is_grad_enabled() else allocate(q)

    yield "packed_attention", attend, packed
    yield "torch's share", do_nothing, packed
    yield "masked_attention", attend_masked, dense
    yield "readout", read, (first, k, v)


def _leaves(*shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))


def _with_gradients(call: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    ones = torch.ones_like(call())
    return lambda: torch.autograd.grad(call(), leaves, ones)


def _microseconds(call: Callable[[], object]) -> float:
    """Measure the median processor time of a call until it returns, in µs."""
    call()
    rounds = []
    for _ in range(15):
        began = time.thread_time()
        for _ in range(50):
            call()
        rounds.append((time.thread_time() - began) / 50 * 1e6)
    return statistics.median(rounds)
