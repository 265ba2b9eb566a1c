"""Checks of repeated calls on a simulated GPU: what they launch, look up and keep.

Each check returns the fault in words, empty if there is none.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

import maskattn
from bench.aot.every_call import HEADS, Shape, run
from bench.aot.stub import StubDevice
from maskattn import derived
from maskattn.kernels.attention import backward, forward
from maskattn.kernels.launch import prepared, schedule, tail

__all__ = ["few_launches", "nothing_is_left", "same_as_the_launcher"]

WIDTH = 64


def same_as_the_launcher() -> str:
    """Check that every repeated launch has the kernel and the arguments that Triton's launcher would use."""
    seen = Counter[str]()
    with _judged(seen):
        for operation, shape in _shapes():
            run(operation, shape)
            run(operation, shape)
        q, k, v = (torch.zeros(40, HEADS, WIDTH, dtype=torch.bfloat16) for _ in range(3))
        ours, theirs = (torch.tensor([0, *lengths], dtype=torch.int32) for lengths in ((7, 40), (30, 40)))
        # The same tensor twice, then two of the same layout, then rows that are not aligned to 16 bytes.
        for keys, values, starts in ((q, q, ours), (k, v, ours), (k, v, theirs)):
            maskattn.packed_attention(q, keys, values, ours, starts, 40, 40, impl="triton")
        shifted = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
        maskattn.packed_attention(shifted, k, v, ours, theirs, 40, 40, impl="triton")
    lacking = {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "clear_tail_kernel"} - set(seen)
    return f"no launch of {sorted(lacking)} was repeated" if lacking else ""


def _shapes() -> Iterator[tuple[str, Shape]]:
    for lengths, options in (((1,), False), ((48,), False), ((5, 0, 12), False), ((5, 0, 12), True)):
        yield "packed_attention", Shape(lengths, head_width=WIDTH, options=options)
    for operation in ("masked_attention", "readout_with_rows"):
        yield operation, Shape((5, 0, 12), head_width=WIDTH)


@contextmanager
def _judged(seen: Counter[str]) -> Iterator[None]:
    """Fail if a launch from a template differs from the launcher's own for the same arguments."""
    plain, launch = prepared.launch_prepared, prepared.launch

    def judge(known: Any, tensors: Any, make: Callable[[], prepared.Launch], q: Tensor) -> None:
        given: list[tuple[Any, ...]] = []

        def record(kernel: Any, programs: int, described: bool, q: Tensor, *arguments: Any, **constants: Any) -> Any:
            given.append((kernel, programs, described, arguments))
            return launch(kernel, programs, described, q, *arguments, **constants)

        with mock.patch.object(prepared, "launch", record):
            plain(known, tensors, make, q)
        (kernel, programs, described, arguments), made = given[0], make()
        if not isinstance(kernel, triton.compiler.CompiledKernel) or programs == 0:
            return
        seen[made.kernel.__name__] += 1
        named = dict(zip(made.kernel.arg_names, made.arguments, strict=False)) | dict(made.constants)
        expected = _with_addresses(tuple(named[name] for name in made.kernel.arg_names))
        assert (programs, described) == (made.programs, made.described), made.kernel.__name__
        assert _with_addresses(arguments) == expected, made.kernel.__name__
        assert launch(made.kernel, programs, described, q, *made.arguments, **made.constants) is kernel

    with ExitStack() as patches:
        for module in (forward, backward, schedule, tail):
            patches.enter_context(mock.patch.object(module, "launch_prepared", judge))
        yield


def _with_addresses(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(_with_addresses(x) for x in argument)
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def few_launches(device: StubDevice) -> str:
    """Check what a repeated call launches, and that it looks up nothing again."""
    lengths = torch.tensor([50, 64, 14])
    packing = maskattn.Packing.from_keep(torch.arange(64) < lengths[:, None])
    q, k, v = (torch.zeros(128, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    ones, starts = torch.ones_like(q), packing.cu_seqlens.clone()

    def packed() -> None:
        torch.autograd.grad(maskattn.packed_attention(q, k, v, packing, impl="triton"), (q, k, v), ones)

    def by_lengths() -> None:
        maskattn.packed_attention(q.detach(), k.detach(), v.detach(), starts, starts, 64, 64, impl="triton")

    def in_inference_mode() -> None:
        with torch.inference_mode():
            by_copy = starts.clone()
            maskattn.packed_attention(q, k, v, by_copy, by_copy, 64, 64, impl="triton")

    def after_a_change() -> None:
        starts[1] += 1
        by_lengths()

    passes = {"forward_kernel": 1, "query_gradient_kernel": 1, "key_gradient_kernel": 1}
    forward = {"forward_kernel": 1, "clear_tail_kernel": 1}
    for call, expected in (
        (packed, passes),
        (by_lengths, forward),
        (in_inference_mode, forward | {"schedule_kernel": 1}),
        (after_a_change, forward | {"schedule_kernel": 1}),
    ):
        call()
        before, looked_up = device.launches, []
        run_of_the_launcher = triton.JITFunction.run

        def count(self: Any, *args: Any, plain: Any = run_of_the_launcher, to: Any = looked_up, **kwargs: Any) -> Any:
            to.append(self.__name__)
            return plain(self, *args, **kwargs)

        with mock.patch.object(triton.JITFunction, "run", count):
            call()
        launched = {name: count for name, count in (device.launches - before).items() if count}
        if launched != expected:
            return f"{call.__name__} launches {launched}, not {expected}"
        if looked_up:
            return f"{call.__name__} looks {looked_up} up again"
    return ""


def nothing_is_left() -> str:
    """Check that no cache holds tensors or lengths of earlier calls."""
    gc.collect()
    before = len(derived._KEPT)
    tensors = []
    for _ in range(3):
        lengths = torch.tensor([20, 30])
        packing = maskattn.Packing.from_keep(torch.arange(30) < lengths[:, None])
        q = torch.zeros(50, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        maskattn.packed_attention(q, q, q, packing, impl="triton").sum().backward()
        tensors += [weakref.ref(x) for x in (q, packing.cu_seqlens)]
        del q, packing
    gc.collect()
    alive = sum(x() is not None for x in tensors)
    left = len(derived._KEPT) - before
    return f"{alive} tensors are alive, and of {left} lengths something is kept" if alive or left else ""
