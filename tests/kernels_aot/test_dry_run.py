"""Public calls on a GPU that is not there, down to the launches; a process of its own believes that it has one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if shutil.which(os.environ.get("CC", "cc")) is None:
    pytest.skip("the stub of the driver is written in C, and there is no compiler", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    ("target", "cases"),
    [
        ("sm90", "packed_attention, bf16, width 64"),
        ("sm90", "packed_attention_in_gluon, bf16, width 72"),
        ("sm80", "readout_with_rows, bf16, width 64, every"),
        ("sm120", "relevance, bf16, width 64"),
        ("sm100", "packing"),
        ("sm90", "far apart"),
        ("sm90", "copied"),
        ("sm90", "made again"),
    ],
)
def test_calls_compile_and_launch_within_the_limits_of_the_chip(target, cases):
    done = in_a_process(
        "-m", "bench.aot.dry_run", "--target", target, "--quick", "--cases", cases, "--random-shapes", "3"
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "ok " in done.stdout


def test_the_time_that_a_call_keeps_the_host_is_printed_beside_that_of_torch_alone():
    done = in_a_process("-m", "bench.aot.dry_run", "--host-time")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        whole, both, floor, floor_of_both, *others = (int(x) for x in re.findall(r"(\d+) µs", line))
        assert len(others) == 4
        assert 0 < floor < floor_of_both
        # The least that torch needs is less than the whole.
        assert floor < whole < both
        assert floor_of_both < both


TRAINING_STEP = """
import sys, torch
from pathlib import Path
from bench.aot.every_call import OPERATIONS, Shape, run
from bench.aot.stub import StubDevice
device = StubDevice("sm90", Path("{folder}"))
for operation in OPERATIONS:
    run(operation, Shape((5, 12)))
assert device.launches["key_gradient_kernel"]
assert "torch._dynamo" not in sys.modules
"""


def test_no_call_imports_the_compiler(tmp_path):
    done = in_a_process("-c", TRAINING_STEP.format(folder=tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


BROKEN = """
import torch, triton, triton.language as tl
from pathlib import Path
from bench.aot.stub import StubDevice
device = StubDevice("{target}", Path("{folder}"))

@triton.jit
def too_much(x_ptr, count, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + rows[:, None] * BLOCK + rows[None, :])
    tl.store(x_ptr + rows[:, None] * BLOCK + rows[None, :], tl.dot(a, a))

@triton.jit
def crashes_with_one(x_ptr, count):
    tl.store(x_ptr, count.to(tl.int64))

x = torch.zeros(2**16)
{call}
print(device.launches, device.compiled, device.refused)
"""


def run_broken(target: str, call: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Kernels can only be defined in a file."""
    script = folder / "broken.py"
    script.write_text(BROKEN.format(target=target, folder=folder, call=call))
    return in_a_process(str(script))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("too_much[(1,)](x, 3, BLOCK=256)", "out of resource"),
        ("crashes_with_one[(1,)](x.long(), 1)", "AttributeError"),
        ("crashes_with_one[(1, 70000)](x.long(), 3)", "65,535"),
    ],
    ids=["shared memory", "a number that becomes a constant", "grid"],
)
def test_what_a_gpu_would_refuse_is_refused(call, error, tmp_path):
    done = run_broken("sm86", call, tmp_path)
    assert done.returncode != 0
    assert error in done.stderr


def test_launches_and_variants_are_counted(tmp_path):
    call = "[crashes_with_one[(1,)](x.long(), count) for count in (3, 5, 16)]"
    done = run_broken("sm90", call, tmp_path)
    assert done.returncode == 0, done.stderr
    # 16 is a variant of its own: Triton notes that it can be divided.
    assert done.stdout.strip() == "Counter({'crashes_with_one': 3}) Counter({'crashes_with_one': 2}) 0"
