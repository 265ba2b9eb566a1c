"""All tests and benches that need a GPU, without a network, in steps that can be run in several calls:

    bench/gpu.sh [tests] [sanitize] [bench] [models] [--out FOLDER] [--seconds N]

tests     the kernels' tests and others marked for a GPU, one process per core; the first test of every file comes first
sanitize  compute-sanitizer over every operation with every option, after the kernels were compiled without it
bench     attention, options, readout and packing compared with their peers, the most important rows first
models    a layer and a ViT

Without a step all are run in this order for at most --seconds (540). The report names what was left out, and the same
command continues there: FOLDER keeps outcomes.jsonl and rows.csv, and changed sources are tested again. The exit status
is 1 if a test, the sanitizer or one of our rows failed, 3 if nothing failed but time ran out.
"""

from __future__ import annotations

import argparse
import glob
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu import record
from bench.gpu.outcomes import OutcomeLog, fingerprint
from bench.gpu.shards import collect, interleaved, run_commands, run_tests

__all__ = ["STEPS", "Call", "Report", "main"]

ROOT = Path(__file__).resolve().parents[2]

# The files of the benches in each step.
SUITES = {
    "bench": ("test_attention.py", "test_options.py", "test_readout.py", "test_packing.py"),
    "models": ("test_multihead.py", "test_vit.py"),
}
SANITIZERS = ("memcheck", "racecheck")
WIDTHS, DTYPES = (64, 80), ("bf16", "fp32")

# A peer that hangs in its compiler or on the device is killed this long after the call's time is up.
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Call:
    """The settings of one call of the command.

    Attributes:
        out: the folder that is kept between calls.
        until: time after which nothing is begun.
        shards: number of processes at a time, where nothing is timed.
        device: "cuda", or "cpu" for a dry run on small sizes.
        grid: grid of the benches.
        commit: name of the measured sources, for the rows.
        log: the outcomes of tests and commands.
    """

    out: Path
    until: float
    shards: int
    device: str
    grid: str
    commit: str
    log: OutcomeLog

    @property
    def dry(self) -> bool:
        """Whether this is a dry run without a GPU."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        """Seconds until nothing new may begin."""
        return self.until - time.time()


@dataclass
class Report:
    """The result of a step: sentences for the table, and how many items failed or were left for lack of time."""

    lines: list[str] = field(default_factory=list)
    failed: int = 0
    left: int = 0


def tests(call: Call) -> Report:
    """Test every kernel on the device, in the dtypes and widths of its tests."""
    groups = [["tests/kernels/test_kernel_configs.py"]] if call.dry else [["tests/kernels"], ["tests", "-m", "gpu"]]
    environment = {"TRITON_INTERPRET": "1"} if call.dry else {}
    report, seen = Report(), set()
    for arguments in groups:
        ids = [name for name in interleaved(collect(arguments, ROOT, environment)) if name not in seen]
        seen.update(ids)
        left = run_tests(ids, arguments, call.log, call.shards, call.until, ROOT, environment)
        _tell(report, f"tests of {' '.join(arguments)}", ids, left, call)
    return report


def sanitize(call: Call) -> Report:
    """Run small cases under memcheck and racecheck; they are compiled before, since compilers are slow under either."""
    small = [sys.executable, "-m", "bench.gpu.small_cases", "--device", call.device]
    cases = {
        f"{dtype}, width {width}": ["--widths", str(width), "--dtypes", dtype] for width in WIDTHS for dtype in DTYPES
    }
    if call.dry:
        cases = {"fp32, width 32": ["--impl", "torch", "--widths", "32", "--dtypes", "fp32"]}
    plain = {f"small cases, {name}": [*small, *options] for name, options in cases.items()}
    report = Report()
    left = run_commands(plain, call.log, call.shards, call.until, ROOT)
    _tell(report, "small cases without a sanitizer", plain, left, call)
    tool = None if call.dry else _sanitizer()
    if tool is None:
        report.lines.append("compute-sanitizer is not on this machine: the small cases ran without it")
        return report
    watched = {
        f"{name} under {kind}": [tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "20", *command]
        for kind in SANITIZERS
        for name, command in plain.items()
    }
    # Without torch's caching every tensor is a separate allocation, whose bounds memcheck knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left = run_commands(watched, call.log, min(call.shards, 4), call.until, ROOT, environment)
    _tell(report, "small cases under compute-sanitizer", watched, left, call)
    return report


def bench(call: Call) -> Report:
    """Compare the operations with their peers."""
    return _suites(call, "bench")


def models(call: Call) -> Report:
    """Compare a layer and a ViT with their peers."""
    return _suites(call, "models")


STEPS: dict[str, Callable[[Call], Report]] = {"tests": tests, "sanitize": sanitize, "bench": bench, "models": models}


def _suites(call: Call, step: str) -> Report:
    """Compile the kernels on all cores, and then time them in one process that has the device to itself."""
    paths = [f"bench/gpu/{name}" for name in SUITES[step]]
    options = ["--bench-device", call.device, "--bench-grid", "smoke" if call.dry else call.grid]
    options += ["--bench-impls", "torch"] if call.dry else []
    report = Report()
    compiled = OutcomeLog(call.log.path, f"{call.log.of}, compiled")
    ours = [name for name in collect([*paths, *options], ROOT) if "maskattn" in name]
    # Failures are ignored here, since they occur again when the kernels are timed.
    left = run_tests(ours, [*paths, *options, "--benchmark-disable"], compiled, call.shards, call.until, ROOT)
    if left:
        report.lines.append(f"compiling: {len(left)} of {len(ours)} cases are left")
        report.left += len(left)
        return report
    rows = call.out / "rows.csv"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, *options]
    command += ["--bench-csv", str(rows), "--bench-commit", call.commit, "--bench-seconds", f"{call.seconds_left:.0f}"]
    command += ["--benchmark-columns=median,iqr,rounds"]
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=max(1.0, call.seconds_left) + GRACE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        report.lines.append("the benches were killed after the time was up: a peer did not come back")
        status = 0
    found = [row for row in record.read_rows(rows) if row.commit == call.commit] if rows.exists() else []
    counts = {kind: sum(row.status == kind for row in found) for kind in ("ok", "skipped", "failed", "left out")}
    report.lines.append(", ".join(f"{count} rows {kind}" for kind, count in counts.items() if count) or "no rows")
    report.failed += counts["failed"] + (status not in (0, 1))
    report.left += counts["left out"]
    return report


def _tell(report: Report, what: str, names: Sequence[str] | dict[str, object], left: list[str], call: Call) -> None:
    """Add the outcomes of some tests or commands to a report."""
    ended = call.log.ended()
    outcomes = [ended[name] for name in names if name in ended]
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.outcome] = counts.get(outcome.outcome, 0) + 1
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    report.lines.append(f"{what}: {told}" + (f"; no time was left for {len(left)} of {len(names)}" if left else ""))
    bad = [outcome for outcome in outcomes if outcome.outcome not in ("passed", "skipped")]
    report.lines += [f"{one.outcome.upper()} {one.name}\n{one.reason}" for one in bad]
    report.failed += len(bad)
    report.left += len(left)


def _sanitizer() -> str | None:
    patterns = ["/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer"]
    found = [path for pattern in patterns for path in glob.glob(f"{pattern}/compute-sanitizer") if os.path.isfile(path)]
    return shutil.which("compute-sanitizer") or next(iter(found), None)


def versions(commit: str) -> str:
    """Return the versions and the device without which a figure is meaningless."""
    import torch

    lines = [f"python {sys.version.split()[0]} on {platform.platform()}", f"commit {commit}"]
    lines.append(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for name in ("triton", "numpy", "pytest", "pytest_benchmark", "flash_attn", "flash_attn_interface", "xformers"):
        try:
            lines.append(f"{name} {getattr(__import__(name), '__version__', '?')}")
        except ImportError as error:
            lines.append(f"{name} is absent: {error}")
    if torch.cuda.is_available():
        lines.append(str(torch.cuda.get_device_properties(0)))
    return "\n".join(lines)


def _build() -> None:
    """Build the extension, unless it is newer than its sources; figures of the device do not need it."""
    built = [path.stat().st_mtime for path in (ROOT / "maskattn").glob("_native*.so")]
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if not built or max(built) < newest:
        done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT)
        if done.returncode:
            print("the extension could not be built; what needs it is skipped", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("gpu_out"), help="kept between calls (gpu_out)")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin nothing after this many seconds (540)")
    parser.add_argument("--shards", type=int, default=os.cpu_count() or 1, help="processes at a time (one per core)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu for a dry run")
    parser.add_argument("--grid", choices=("quick", "full"), default="quick", help="grid of the benches")
    parser.add_argument("--commit", default="", help="name of the measured sources, for a checkout without git history")
    given = parser.parse_args(arguments)
    if unknown := [step for step in given.steps if step not in STEPS]:
        parser.error(f"a step must be one of {', '.join(STEPS)}, got {', '.join(unknown)}")
    began = time.time()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    sources = fingerprint(ROOT)
    commit = given.commit or sources
    log = OutcomeLog(out / "outcomes.jsonl", sources)
    call = Call(out, began + given.seconds, given.shards, given.device, given.grid, commit, log)
    _build()
    reports = _take(call, [step for step in STEPS if not given.steps or step in given.steps])
    table = [versions(commit), ""]
    for step, report in reports.items():
        table += [f"== {step}", *report.lines]
    if (out / "rows.csv").exists():
        table += ["", record.table(record.read_rows(out / "rows.csv"))]
    (out / "table.txt").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))
    if any(report.failed for report in reports.values()):
        return 1
    return 3 if any(report.left for report in reports.values()) else 0


def _take(call: Call, steps: Sequence[str]) -> dict[str, Report]:
    reports: dict[str, Report] = {}
    for step in steps:
        if call.seconds_left <= 0:
            reports[step] = Report(["not begun: no time was left; the same command goes on here"], left=1)
            continue
        print(f"== {step}, {call.seconds_left:.0f} s left", flush=True)
        began = time.time()
        try:
            reports[step] = STEPS[step](call)
        except Exception as error:  # the remaining steps are informative too
            reports[step] = Report([f"{type(error).__name__}: {error}"], failed=1)
        reports[step].lines.append(f"{time.time() - began:.0f} s")
        print("\n".join(reports[step].lines), flush=True)
    return reports


if __name__ == "__main__":
    sys.exit(main())
