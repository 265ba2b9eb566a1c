"""Time and memory of CDAM for all classes, against autograd for each class and against a full backward for each.

    OMP_WAIT_POLICY=passive python -m bench.cpu.explanation_speed --page docs/evidence.md     # CPU, two threads
    python -m bench.cpu.explanation_speed --device cuda --depth 12

Contenders of one length run in interleaved rounds in one process; a time is the minimum over rounds, and only ratios
are worth quoting. A contender that takes longer than a quarter of the limit is run once. All contenders run on the same
packed attention, so that the ratios are those of the methods, not of the kernels.

- closed form: CDAM's tail, last block to maps, for all K classes at once
- autograd, one row: the same tail, a backward through the class token's attention row for each class
- autograd, block: a backward through the whole last block for each class
- CDAM: backbone and tail
- backward a class: the authors' method, a graph through the whole model and a full backward for each class
- Smooth, Integrated: backbone and 50 tails, one class
- 50 full passes: 50 times a forward and a backward through the whole model

The autograd contenders repeat a forward, or a backward through its graph. Both are timed at every length. If all
repetitions would take longer than the limit, their time is extrapolated from these, which the table marks with ≈, and
the memory is that of one graph; if they are measured too, the text states the difference. A contender that would take
too long, or more memory than there is, judged by the previous length, is left out and named.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from bench.cpu.explanation_contenders import PATCH_PX, Contender, ExplainClass, contenders, graphs, new_model
from bench.evidence.table import write_section

__all__ = ["Figure", "Guard", "Measured", "Turns", "measure", "report", "table"]

PAIRS = (
    ("closed form", "autograd, one row"),
    ("closed form", "autograd, block"),
    ("CDAM", "backward a class"),
    ("Smooth", "50 full passes"),
    ("Integrated", "50 full passes"),
)
MEMORY_SHARE = 0.9

Key: TypeAlias = "tuple[str, int]"  # a contender and its number of classes; a graph and 0


@dataclass(frozen=True)
class Figure:
    """A cell of the table; ``counted`` if the time was extrapolated instead of measured."""

    seconds: float
    mebibytes: float
    counted: bool = False


@dataclass
class Measured:
    """The results at one length.

    Attributes:
        figures: seconds and extra MiB by contender and number of classes.
        differences: relative difference of extrapolated from measured seconds, where there are both.
        left_out: reasons by contender and number of classes.
    """

    figures: dict[Key, Figure] = field(default_factory=dict)
    differences: dict[Key, float] = field(default_factory=dict)
    left_out: dict[Key, str] = field(default_factory=dict)


class Guard:
    """Decides from the previous length what not to run: time grows at most as tokens², memory as tokens.

    Args:
        longest: seconds that a single call may take.
        free: returns the available memory in MiB.
    """

    def __init__(self, longest: float, free: Callable[[], float]) -> None:
        self.longest, self.free = longest, free
        self.last: dict[Key, tuple[int, float, float]] = {}

    def objection(self, key: Key, tokens: int) -> str | None:
        """Return the reason for leaving a call out; None if it may run."""
        if key not in self.last:
            return None
        before, seconds, mebibytes = self.last[key]
        seconds, mebibytes = seconds * (tokens / before) ** 2, mebibytes * tokens / before
        if seconds > self.longest:
            return f"it would take up to {seconds:,.0f} s"
        if mebibytes > MEMORY_SHARE * (free := self.free()):
            return f"it would need about {mebibytes:,.0f} MiB, and {free:,.0f} MiB were free"
        return None


def measure(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Measure the seconds and extra MiB of one call."""
    (seconds,), mebibytes = measure_steps(_in_one_step(call), device)
    return seconds, mebibytes


def measure_steps(steps: Iterator[None], device: str) -> tuple[list[float], float]:
    """Measure the seconds of each step, up to its yield, and the extra MiB of all steps."""
    _give_back_memory(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _kibibytes("self/status", "VmRSS") * 1024
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak
    seconds = []
    start = time.perf_counter()
    for _ in steps:
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _kibibytes("self/status", "VmHWM") * 1024
    return seconds, max(peak - before, 0) / 2**20


def _in_one_step(call: Callable[[], object]) -> Iterator[None]:
    call()
    yield


def _forward_and_backwards(build: Callable[[], ExplainClass], short: float) -> Iterator[None]:
    explain = build()
    yield
    start = time.perf_counter()
    explain(0, keep_graph=True)
    yield
    # Only the first of many backwards gets its memory from the system, so a short backward is timed at its second run.
    if time.perf_counter() - start < short:
        explain(0, keep_graph=False)
        yield


def free_mebibytes(device: str) -> float:
    """Return the memory that can be allocated after measured calls have freed theirs."""
    return torch.cuda.mem_get_info()[0] / 2**20 if device == "cuda" else _kibibytes("meminfo", "MemAvailable") / 1024


def _give_back_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed by an earlier call is reused and not counted


def _kibibytes(file: str, field: str) -> int:
    line = next(row for row in Path("/proc", file).read_text().splitlines() if row.startswith(field))
    return int(line.split()[1])


class Turns:
    """The runs of one length, from which its figures are taken.

    Args:
        builds: functions that build a graph, by name.
        contestants: contenders with graphs among these.
        limit: seconds up to which a time that can be extrapolated is measured instead; a call of more than a quarter of
            them is not repeated.
    """

    def __init__(
        self, builds: dict[str, Callable[[], ExplainClass]], contestants: Sequence[Contender], limit: float
    ) -> None:
        self.limit = limit
        self.steps: dict[Key, Callable[[], Iterator[None]]] = {
            (name, 0): lambda b=build: _forward_and_backwards(b, limit / 4) for name, build in builds.items()
        }
        self.steps |= {(one.name, one.classes): lambda c=one.call: _in_one_step(c) for one in contestants}
        self.repeated = {(one.name, one.classes): one.repeated for one in contestants}
        self.runs: dict[Key, list[tuple[float, ...]]] = {}
        self.mebibytes: dict[Key, float] = {}
        self.left_out: dict[Key, str] = {}

    def turn(self, tokens: int, guard: Guard, device: str) -> None:
        """Run each contender once that is short enough to be repeated or measured completely, if the guard permits."""
        for key, steps in self.steps.items():
            if key in self.runs:
                if sum(self.runs[key][-1]) > self.limit / 4:
                    continue
            elif self.repeated.get(key) is not None and (self.counted(key) or math.inf) > self.limit:
                continue
            elif reason := guard.objection(key, tokens):
                self.left_out[key] = reason
                continue
            if key not in self.runs:
                print(f"{tokens} tokens: {key[0]}" + (f", {_classes(key[1])}" if key[1] else ""), flush=True)
            seconds, mebibytes = measure_steps(steps(), device)
            self.runs.setdefault(key, []).append((seconds[0], *seconds[1:][-1:]))
            self.mebibytes[key] = max(self.mebibytes.get(key, 0.0), mebibytes)

    def best(self, key: Key) -> tuple[float, ...]:
        """Return the least seconds of each step; the first run is a warm-up, which counts only if there is no other."""
        runs = self.runs[key]
        return tuple(map(min, *runs[1:])) if len(runs) > 2 else runs[-1]

    def counted(self, key: Key) -> float | None:
        """Return the extrapolated seconds of a contender, those of its unit times its repetitions; None if unknown."""
        way = self.repeated[key]
        if way is None or (way.graph, 0) not in self.runs:
            return None
        forward, backward = self.best((way.graph, 0))
        return way.forwards * forward + way.backwards * backward

    def measured(self) -> Measured:
        """Return each contender's measured figure if it was run, else the extrapolated one, else why there is none."""
        found = Measured()
        for key, way in self.repeated.items():
            counted = self.counted(key)
            if key in self.runs:
                whole = sum(self.best(key))
                found.figures[key] = Figure(whole, self.mebibytes[key])
                if counted is not None:
                    found.differences[key] = counted / whole - 1
            elif way is not None and counted is not None:
                found.figures[key] = Figure(counted, self.mebibytes[way.graph, 0], counted=True)
            else:
                found.left_out[key] = self.left_out[key if way is None else (way.graph, 0)]
        return found


def run(arguments: argparse.Namespace) -> dict[int, Measured]:
    """Measure every length, shortest first."""
    guard = Guard(arguments.longest, lambda: free_mebibytes(arguments.device))
    results = {}
    sides = sorted({round((length - 1) ** 0.5) for length in arguments.tokens})
    # A long first length has no predecessor to judge by, so a shorter one is run first and not shown.
    for side in [min(32, sides[0]), *sides]:
        tokens = side * side + 1
        if tokens in results:
            continue
        model = new_model(max(arguments.classes), arguments.width, arguments.depth, side, arguments.device)
        x = torch.randn(1, 1, side * PATCH_PX, side * PATCH_PX, device=arguments.device)
        turns = Turns(graphs(model, x), contenders(model, x, arguments.classes, arguments.m), arguments.limit)
        for _ in range(arguments.rounds + 1):
            turns.turn(tokens, guard, arguments.device)
        guard.last |= {key: (tokens, sum(turns.best(key)), turns.mebibytes[key]) for key in turns.runs}
        results[tokens] = turns.measured()
    return {tokens: found for tokens, found in results.items() if round((tokens - 1) ** 0.5) in sides}


def table(results: dict[int, Measured], m: int) -> str:
    """Format a row for each pair, number of classes and length, with ratios of theirs to ours in time and memory."""
    lines = ["| ours | theirs | classes | tokens | ours | theirs | time | memory |", "|---" * 8 + "|"]
    for ours, theirs in PAIRS:
        theirs = theirs.replace("50", str(m))
        counts = sorted(
            {K for found in results.values() for name, K in {*found.figures, *found.left_out} if name == ours}
        )
        for K in counts:
            for tokens, found in results.items():
                one, other = found.figures.get((ours, K)), found.figures.get((theirs, K))
                cells = [ours, theirs, str(K), str(tokens), _cell(one), _cell(other), *_ratios(one, other)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(one: Figure | None) -> str:
    if one is None:
        return "left out"
    seconds = f"{one.seconds:,.0f}" if one.seconds >= 100 else f"{one.seconds:.3g}"
    return f"{'≈ ' if one.counted else ''}{seconds} s, {one.mebibytes:,.0f} MiB"


def _ratios(one: Figure | None, other: Figure | None) -> tuple[str, str]:
    if one is None or other is None:
        return "–", "–"
    mark = "≈ " if one.counted or other.counted else ""
    memory = f"{other.mebibytes / one.mebibytes:.1f}×" if one.mebibytes >= 1 else "–"
    return f"{mark}{other.seconds / one.seconds:,.1f}×", memory


def report(results: dict[int, Measured], arguments: argparse.Namespace) -> str:
    """Format the table and a description of the measurements."""
    threads = f", {arguments.threads} thread{'s' * (arguments.threads != 1)}" if arguments.device == "cpu" else ""
    parts = [
        f"A ViT of width {arguments.width}, depth {arguments.depth} and {max(arguments.classes)} outputs, one image, "
        f"{arguments.device}{threads}; seconds and extra MiB. ≈: counted from one forward and one backward, since the "
        f"whole would take longer than {arguments.limit:g} s; the memory is that of one graph and one map.",
        table(results, arguments.m),
    ]
    both = {(tokens, *key): d for tokens, found in results.items() for key, d in found.differences.items()}
    if both:
        (tokens, name, K), largest = max(both.items(), key=lambda item: abs(item[1]))
        parts.append(
            f"Counted against whole, {len(both)} times both: the largest difference is {largest:+.0%} "
            f"({name}, {tokens} tokens, {_classes(K)}); on average the two are "
            f"{sum(map(abs, both.values())) / len(both):.0%} apart."
        )
    missing = [
        f"{name} at {tokens} tokens and {_classes(K)} ({why})"
        for tokens, found in results.items()
        for (name, K), why in found.left_out.items()
    ]
    if missing:
        parts.append(f"Left out, judged by the length before: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def _classes(K: int) -> str:
    return f"{K} class{'es' * (K != 1)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 1025, 4097, 16385, 65537])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--m", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds that what can be counted may take whole")
    parser.add_argument("--longest", type=float, default=1800.0, help="seconds that any call may take")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--page", type=Path, help="write the table into this page, e.g. docs/evidence.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = report(run(arguments), arguments)
    print(text)
    if arguments.page is not None:
        write_section(arguments.page, "speed", text)


if __name__ == "__main__":
    main()
