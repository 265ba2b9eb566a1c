"""Checks of repeated calls on a simulated GPU: what they launch, look up and keep.

Each check returns the fault in words, empty if there is none.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.nvidia import driver

import maskattn
from bench.aot.every_call import HEADS, Shape, run
from bench.aot.stub import StubDevice
from maskattn import derived
from maskattn.kernels.attention import backward, forward, masked
from maskattn.kernels.attention.key_gradient import key_gradient_kernel
from maskattn.kernels.attention.query_gradient import query_gradient_kernel
from maskattn.kernels.launch import prepared, recording, replay, schedule, tail
from maskattn.kernels.readout import call as readout_call
from maskattn.kernels.readout import forward as readout
from maskattn.kernels.readout import gradient

__all__ = ["every_ingredient", "few_launches", "hooks_see_launches", "nothing_is_left", "same_as_the_launcher"]

WIDTH = 64
KERNELS = (
    forward.forward_kernel, query_gradient_kernel, key_gradient_kernel, schedule.schedule_kernel,
    tail.clear_tail_kernel, readout.readout_kernel, readout.combine_kernel, gradient.row_gradient_kernel,
    gradient.readout_gradient_kernel,
)  # fmt: skip


def same_as_the_launcher() -> str:
    """Check that every repeated launch and pass reaches the driver as Triton's launcher would make it."""
    seen = Counter[str]()
    with judged(seen):
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
        plans = _readouts(seen) or _masked(seen)
    lacking = sorted(name for name in {kernel.__name__ for kernel in KERNELS} | {"direct"} if not seen[name])
    return f"no launch was repeated of {lacking}" if lacking else plans


def _readouts(seen: Counter[str]) -> str:
    """Check readouts of the same sequences, with one part of the keys and several, rows and options."""
    alibi = {"coords": (torch.zeros(2, 1, 2), torch.zeros(50, 2)), "slopes": torch.zeros(HEADS)}
    calls: tuple[tuple[tuple[int, ...], int, dict[str, Any], int], ...] = (
        ((20, 0, 30), 1, {}, 2), ((300, 700), 3, {}, 2), ((20, 30), 1, alibi, 2),
        ((300, 5), 2, {"key_bias": torch.zeros(305)}, 2),
        # torch negates the gradient of lse, and sums what the rows' gradient adds, so that backward is not replayed.
        ((300, 5), 1, {"return_lse": True}, 1), ((300, 5), 1, {"return_rows": True}, 1),
    )  # fmt: skip
    for lengths, queries, options, replays in calls:
        tokens, starts = sum(lengths), torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        for scale in (None, 0.5):
            taken = []
            for _ in range(2):
                q = torch.zeros(len(lengths), queries, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
                k, v = torch.zeros(2, tokens, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
                before = seen["passes"]
                found = maskattn.readout(q, k, v, starts, max(lengths), scale=scale, **options, impl="triton")
                found = found if isinstance(found, tuple) else (found,)
                torch.autograd.grad(found, (q, k, v), [torch.zeros_like(x) for x in found])
                taken.append(seen["passes"] - before)
            if taken != [0, replays]:
                return f"readouts of {lengths} with {list(options)} and scale {scale} take {taken} plans"
    return ""


def _masked(seen: Counter[str]) -> str:
    """Check dense tensors with the same mask: queries of background, biases, and a mask that is written to."""
    keep, qkv = torch.rand(3, 40) < 0.5, torch.zeros(3, 3, HEADS, 40, WIDTH, dtype=torch.bfloat16)
    bias = torch.zeros(3, HEADS, 40)
    for skips, options in ((True, {}), (False, {}), (True, {"key_bias": bias}), (False, {"scale": 0.5})):
        taken = []
        for changed in (False, False, True):
            if changed:
                keep[0, 0] ^= True
            leaves, before = [x.clone().requires_grad_() for x in qkv], seen["passes"]
            out = maskattn.masked_attention(*leaves, keep, skip_queries=skips, **options, impl="triton")
            torch.autograd.grad(out, leaves, torch.zeros_like(out))
            taken.append(seen["passes"] - before)
        if taken != [0, 2, 0]:
            return f"masked calls with skip_queries={skips} and {list(options)} take {taken} plans"
    return ""


def _shapes() -> Iterator[tuple[str, Shape]]:
    for lengths, options in (((1,), False), ((48,), False), ((5, 0, 12), False), ((5, 0, 12), True)):
        yield "packed_attention", Shape(lengths, head_width=WIDTH, options=options)
    for operation in ("masked_attention", "readout", "readout_with_rows"):
        for options in (False, True):
            yield operation, Shape((5, 0, 12), queries=2, head_width=WIDTH, options=options)
    yield "readout", Shape((300, 700), head_width=WIDTH)


def every_ingredient() -> str:
    """Check calls that differ in one respect from one that is replayed: they take no plan but their own."""
    lengths, seen = torch.tensor([50, 0, 14]), Counter[str]()
    packing = maskattn.Packing.from_keep(torch.arange(64) < lengths[:, None])
    starts, other = packing.cu_seqlens, torch.tensor([0, 20, 40, 64], dtype=torch.int32)
    qkv = torch.zeros(4, 64, 3, HEADS, 2 * WIDTH, dtype=torch.bfloat16)
    base = {"qkv": qkv[0, ..., :WIDTH].unbind(1), "starts": (starts, starts, 64, 64), "options": {}}
    bias, per_head = torch.zeros(64), torch.zeros(64, HEADS)
    alibi = {"coords": torch.zeros(64, 2), "slopes": torch.zeros(HEADS)}
    contiguous, shifted = torch.zeros(64, HEADS, WIDTH, dtype=qkv.dtype), qkv[0, ..., 1 : WIDTH + 1].unbind(1)
    plain = base["qkv"]
    changes: dict[str, dict[str, Any]] = {
        **{f"strides of {name}": {"qkv": _with(plain, i, contiguous)} for i, name in enumerate("qkv")},
        **{f"address of {name}": {"qkv": _with(plain, i, shifted[i])} for i, name in enumerate("qkv")},
        "dtype": {"qkv": [x.half() for x in plain]},
        "head width": {"qkv": [x[..., :32] for x in plain]},
        "heads": {"qkv": [x[:, :1] for x in plain]},
        "queries alone": {"qkv": (torch.zeros(70, HEADS, WIDTH, dtype=qkv.dtype), *plain[1:]), "starts": (
            torch.tensor([0, 30, 50, 70], dtype=torch.int32), starts, 64, 64)},
        "lengths of the keys": {"starts": (starts, other, 64, 64)},
        "lengths of the queries": {"starts": (other, starts, 64, 64)},
        "longest query": {"starts": (starts, starts, 50, 64)},
        "longest key": {"starts": (starts, starts, 64, 50)},
        "scale": {"options": {"scale": 0.5}},
        "a negative scale": {"options": {"scale": -0.5}},
        "a bias": {"options": {"key_bias": bias}},
        "a bias of each head": {"options": {"key_bias": per_head}},
        "strides of a bias": {"options": {"key_bias": torch.zeros(HEADS, 64).T}},
        "dtype of a bias": {"options": {"key_bias": bias.half()}},
        "address of a bias": {"options": {"key_bias": torch.zeros(65)[1:]}},
        "slopes": {"options": alibi},
        "dropout": {"options": {"dropout_p": 0.1}},
        "share of dropout": {"options": {"dropout_p": 0.7}},
    }  # fmt: skip
    active = triton.runtime.driver.active
    with judged(seen):
        for name, change in {"base": {}, **changes}.items():
            taken = [_taken(seen, **{**base, **change}) for _ in range(2)]
            if taken[0]:
                return f"a call of another {name} takes a plan that was made before"
            if not taken[1] and name != "a negative scale":
                return f"a call of another {name} has no plan of its own"
        with mock.patch.object(active, "get_current_stream", return_value=1):
            if _taken(seen, **base):
                return "a call on another stream takes a plan that was made before"
        starts += 0
        thrice = {**base, "qkv": [plain[0]] * 3}
        if _taken(seen, **thrice):
            return "a call with lengths that were written to takes a plan that was made before"
        if _taken(seen, **base) != 2 or _taken(seen, **thrice) != 2:
            return "a call with tensors of the same layouts takes no plan"
    return ""


def _with(tensors: Sequence[Tensor], position: int, x: Tensor) -> list[Tensor]:
    return [x if at == position else each for at, each in enumerate(tensors)]


def _taken(seen: Counter[str], qkv: Sequence[Tensor], starts: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Return how many passes of a call, forward and backward, were replayed."""
    before = seen["passes"]
    of_each = {id(x): x.detach().requires_grad_() for x in qkv}
    leaves = [of_each[id(x)] for x in qkv]
    out = maskattn.packed_attention(*leaves, *starts, **options, impl="triton")
    torch.autograd.grad(out, leaves, torch.zeros_like(out))
    return seen["passes"] - before


@contextmanager
def judged(seen: Counter[str]) -> Iterator[None]:
    """Fail if a launch from a template or a replayed pass differs from what Triton's launcher makes of the same call.

    ``seen`` counts repeated launches by kernel, replayed passes as "passes", and launches without Triton's Python code
    as "direct".
    """
    utils = triton.runtime.driver.active.utils
    at_the_driver, reached = utils.launch, []
    nested: dict[int, tuple[Any, Any]] = {}

    def annotate(types: Any) -> Any:
        annotations = plain_annotate(types)
        nested[id(annotations)] = annotations, types
        return annotations

    def launch(*given: Any) -> None:
        *first, scratch, _, annotations, signature, arguments = given
        # Without hooks and their metadata; of memory for descriptors, whether there is any.
        # Triton's own launcher gets nested arguments, of which the types say what is passed; ours get these alone.
        _, types = nested.get(id(annotations), (None, None))
        seen["direct"] += types is None
        passed = arguments if types is None else tuple(_passed(arguments, types))
        addresses = (x.data_ptr() if isinstance(x, Tensor) else x for x in passed)
        reached.append((*first[:8], scratch is None, bytes(signature), *addresses))
        at_the_driver(*given)

    def done_by(work: Callable[[], Any]) -> tuple[Any, list[tuple[Any, ...]]]:
        begun = len(reached)
        return work(), reached[begun:]

    def judge(
        known: Any, tensors: Any, make: Callable[[], prepared.Launch], q: Tensor, of_lengths: bool = False
    ) -> None:
        count = len(prepared._TEMPLATES)
        _, ours = done_by(lambda: plain_launch(known, tensors, make, q, of_lengths))
        if len(prepared._TEMPLATES) > count or not ours:
            return
        made = make()
        seen[made.kernel.__name__] += 1
        given = made.kernel, made.programs, made.described, q, *made.arguments
        _, theirs = done_by(lambda: prepared.launch(*given, **made.constants))
        assert ours == theirs, made.kernel.__name__

    def judge_pass(compute: Any, *given: Any) -> Any:
        made: list[Tensor] = []
        allocate = replay.Plan.allocate

        def note(plan: replay.Plan) -> Any:
            found = allocate(plan)
            made.extend(plan.allocated(*found))
            return found

        with mock.patch.object(replay.Plan, "allocate", note):
            results, ours = done_by(lambda: plain_replay(compute, *given))
        if not made:
            return results
        seen["passes"] += 1
        left = iter(made)

        def empty(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
            x = next(left)
            assert (x.shape, x.dtype, x.device, x.is_contiguous()) == (torch.Size(shape), dtype, device, True)
            return x

        prepared._TEMPLATES.clear()
        with mock.patch.object(recording, "torch", SimpleNamespace(empty=empty)):
            expected, theirs = done_by(lambda: compute(*given))
        assert ours == theirs, f"{compute.__name__}: {ours} in place of {theirs}"
        assert [None if x is None else x.data_ptr() for x in results] == [
            None if x is None else x.data_ptr() for x in expected
        ]
        return results

    plain_launch, plain_replay, plain_annotate = prepared.launch_prepared, replay.replayed, driver.annotate_arguments
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(utils, "launch", launch))
        patches.enter_context(mock.patch.object(driver, "annotate_arguments", annotate))
        # Compiled kernels keep the function that launches them, so that they are loaded anew.
        for kernel in KERNELS:
            patches.enter_context(mock.patch.object(kernel, "device_caches", defaultdict(kernel.create_binder)))
        patches.enter_context(mock.patch.dict(prepared._TEMPLATES, clear=True))
        patches.enter_context(mock.patch.dict(derived._KEPT, clear=True))
        for module in (forward, backward, schedule, tail, readout, readout_call):
            patches.enter_context(mock.patch.object(module, "launch_prepared", judge))
        for module in (forward, backward, masked, readout, gradient):
            patches.enter_context(mock.patch.object(module, "replayed", judge_pass))
        yield


def _passed(arguments: Any, types: Any) -> Iterator[Any]:
    """Yield the nested arguments that are not compiled into the kernel."""
    for argument, kind in zip(arguments, types, strict=True):
        if isinstance(kind, tuple):
            yield from _passed(argument, kind)
        elif kind != "constexpr":
            yield argument


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


def hooks_see_launches() -> str:
    """Check that a profiler's hook is called for every launch of a replayed pass, too."""
    packing = maskattn.Packing.from_keep(torch.ones(2, 32, dtype=torch.bool))
    q = torch.zeros(64, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    hook, names = triton.knobs.runtime.launch_enter_hook, []

    def note(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    counts = []
    for hooks in ((), (), (note,), ()):
        for each in hooks:
            hook.add(each)
        maskattn.packed_attention(q, q, q, packing, impl="triton").sum().backward()
        for each in hooks:
            hook.remove(each)
        counts.append(len(names))
    return "" if counts == [0, 0, 3, 3] else f"the hook saw {names}, after each call {counts}"


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
