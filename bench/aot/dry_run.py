"""Every public operation on a simulated GPU: compiled to machine code and launched, without running anything.

    make gpu-dry                                         every target, all cores, until all is done
    python -m bench.aot.dry_run --target sm90 --quick
    python -m bench.aot.dry_run --target sm90 --full     all combinations, for hours
    python -m bench.aot.dry_run --target sm90 --host-time

A run takes the calls of ``covering.py``, each with random shapes of its own. It fails if a kernel does not
compile, a launch exceeds a limit of the chip, a call copies its inputs, or sequences of other lengths cause more
variants of a kernel than :data:`MOST_VARIANTS`. Results are stored in --log and reused while the sources that a call
can reach are unchanged; Triton's cache keeps what was compiled.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import triton

from bench.aot.covering import DTYPES, KINDS, WIDTHS, Case, covering, in_gluon, in_tf32x3, random_shapes
from bench.aot.every_call import HEADS, OF_CHUNKS, ON_HOPPER, OPERATIONS, Shape, run
from bench.aot.host_time import print_host_time
from bench.aot.repeated_calls import (
    every_ingredient,
    few_launches,
    hooks_see_launches,
    nothing_is_left,
    same_as_the_launcher,
)
from bench.aot.stub import CAPABILITIES, StubDevice
from bench.gpu.outcomes import Outcome, OutcomeLog, fingerprint
from maskattn.kernels.tables.attention_short import SHORT_BELOW

__all__ = ["cases", "covering_cases", "long_one", "main"]

ROOT = Path(__file__).resolve().parents[2]
# The sources that decide what a call compiles and launches.
SOURCES = ("maskattn/attention", "maskattn/kernels", "bench/aot")

# Largest number of variants of one kernel in one operation with one head width, dtype and set of options;
# tests/kernels_aot/test_launches.py explains why some have more than one.
MOST_VARIANTS = 7
# One for each number of a readout's queries; a model has one number of them.
MOST_OF_KERNEL = {"relevance_kernel": 16}
RANDOM_SHAPES = 4

FAR_APART = Shape((70, 70), queries=2, head_width=64, far_apart=True)

# Bytes that a call may allocate in addition to its results: schedules, descriptors, sums of splits.
WORKSPACE = 2**21


def covering_cases(target: str) -> list[Case]:
    """Return the cases of a run that covers everything in pairs."""
    each = (
        *covering(list(OPERATIONS)),
        *covering(list(OF_CHUNKS), every=4),
        *in_gluon(list(ON_HOPPER)),
        *in_tf32x3(["packed_attention", "masked_attention"]),
    )
    return [case for case in each if case.target == target]


def cases(quick: bool, target: str) -> Iterator[tuple[str, str, Shape]]:
    """Yield (name, operation, a shape): every operation by dtype, head width and options, or a few of these."""
    widths = [64, 72] if quick else sorted(WIDTHS, key=lambda width: (width % 64 != 0, width % 16 != 0, width))
    for width in widths:
        for dtype in ["bf16"] if quick else DTYPES:
            for options in (False, True):
                on_hopper = ON_HOPPER if target == "sm90" and dtype != "fp32" else {}
                for operation in OPERATIONS | on_hopper:
                    if quick and (operation.endswith(("of_every_query", "of_one_class")) or (options and width != 64)):
                        continue
                    name = f"{operation}, {dtype}, width {width}{', every option' if options else ''}"
                    yield name, operation, Shape((50,), head_width=width, dtype=DTYPES[dtype], options=options)


def long_one(operation: str, like: Shape) -> list[Shape]:
    """Return a shape of one long sequence where long ones are read in another way than short ones; else none."""
    return [replace(like, lengths=(SHORT_BELOW + 8,))] if "attention" in operation else []


def try_case(device: StubDevice, operation: str, shapes: Iterable[Shape]) -> str:
    """Run a case and return its faults in words; empty if there are none."""
    before = device.compiled
    for shape in shapes:
        run(operation, shape)
    if device.refused:
        return "a launch exceeded a limit"
    more = {
        name: count
        for name, count in (device.compiled - before).items()
        if count > MOST_OF_KERNEL.get(name, MOST_VARIANTS)
    }
    return f"lengths caused variants: {more}" if more else ""


def far_apart(device: StubDevice) -> str:
    """Check tokens that are spread over more than 2^31 elements, in memory that is allocated and never touched."""
    for operation in OPERATIONS | OF_CHUNKS:
        run(operation, FAR_APART)
    return "a launch exceeded a limit" if device.refused else ""


def allocates_little() -> str:
    """Check that a call of many tokens allocates little in addition to its results, and so copies no input."""
    import maskattn

    tokens, width = 20_000, 64
    q = torch.zeros(tokens, 3, HEADS, width, dtype=torch.bfloat16)
    starts = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)

    def attend() -> tuple[torch.Tensor, ...]:
        return maskattn.packed_attention(*q.unbind(1), starts, starts, tokens, tokens, return_lse=True, impl="triton")

    def read() -> tuple[torch.Tensor, ...]:
        k, v = q[:, 1], q[:, 2]
        return maskattn.readout(q[:2, None, 0], k, v, starts, tokens, return_rows=True, impl="triton")

    for call in (attend, read):
        results = sum(x.numel() * x.element_size() for x in call())
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
        if taken > results + WORKSPACE:
            return f"{call.__name__} allocates {taken} bytes, its results have {results}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Run the cases of one target; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=CAPABILITIES, default="sm90")
    parser.add_argument("--quick", action="store_true", help="two head widths in bfloat16")
    parser.add_argument("--full", action="store_true", help="every dtype with every head width and every option")
    parser.add_argument("--cases", default="", help="run only cases whose names contain this")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th case from the I-th")
    parser.add_argument("--random-shapes", type=int, default=RANDOM_SHAPES, help="random shapes of each kind")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--log", type=Path, default=None, help="file that stores results between runs")
    parser.add_argument("--host-time", action="store_true", help="print the time of calls until they return")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        device = StubDevice(given.target, Path(folder))
        if given.host_time:
            print_host_time()
            return 0
        log = OutcomeLog(given.log or Path(folder) / "log.jsonl", f"{_sources()}, {given.target}")
        return _run(device, log, given)


def _sources() -> str:
    modules = (str(path.relative_to(ROOT)) for path in sorted((ROOT / "maskattn").glob("*.py")))
    return f"{fingerprint(ROOT, (*SOURCES, *modules))}, triton {triton.__version__}"


def _run(device: StubDevice, log: OutcomeLog, given: argparse.Namespace) -> int:
    first, step = (int(x) for x in given.shard.split("/"))
    count = given.random_shapes
    shapes: dict[str, tuple[str, list[Shape]]] = {}
    if given.quick or given.full:
        for name, operation, like in cases(given.quick, device.target):
            each = (random_shapes(kind, like, count, name + kind) for kind in KINDS)
            of_kinds = (shape for of_kind in each for shape in of_kind)
            shapes[name] = operation, [like, *of_kinds, *long_one(operation, like)]
    else:
        for case in covering_cases(device.target):
            of_kind = random_shapes(case.kind, case.like, count, case.name)
            shapes[case.name] = case.operation, [*of_kind, *long_one(case.operation, case.like)]
    checks: dict[str, Callable[[], str]] = {
        name: functools.partial(try_case, device, *given_to) for name, given_to in shapes.items()
    }
    checks |= {
        "tokens far apart": lambda: far_apart(device),
        "nothing is copied": allocates_little,
        "made again: few launches": lambda: few_launches(device),
        "made again: as the launcher would": same_as_the_launcher,
        "made again: a plan of its own": every_ingredient,
        "made again: hooks see launches": hooks_see_launches,
        "made again: nothing is left": nothing_is_left,
    }
    checks = {name: check for name, check in checks.items() if given.cases in name}
    ended, until = log.ended(), time.time() + given.seconds
    mine = [name for name in list(checks)[first::step] if name not in ended]
    left = 0
    for name in mine:
        if time.time() > until:
            left += 1
            continue
        began = time.time()
        try:
            wrong = checks[name]()
        except Exception as error:  # the remaining cases are informative too
            wrong = f"{type(error).__name__}: {error}"
        log.add(Outcome(name, "failed" if wrong else "passed", round(time.time() - began, 1), wrong[:1500]))
        print(f"{'FAILED' if wrong else 'ok'} {given.target}: {name}, {time.time() - began:.0f} s. {wrong}", flush=True)
    found = [outcome for name, outcome in log.ended().items() if name in checks]
    failed = [outcome.name for outcome in found if outcome.outcome == "failed"]
    print(f"{given.target}: {len(found)} of {len(checks)} cases are done, {len(failed)} failed, {left} left")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
