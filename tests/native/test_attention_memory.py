"""The memory that the C++ attention takes beyond its results, and keeps, is bounded whatever the number of tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# csrc/attention/schedule.hpp: the packed operands of a batch of heads, or of each thread's head, and the scratch of a
# tile. csrc/runtime/aligned_words.cpp: two pieces stay for later calls.
BATCH_MIB, THREAD_MIB, SCRATCH_MIB, KEPT_MIB = 16, 8, 1, 2 * 24

_PROGRAM = """
import sys, torch
from pathlib import Path
from maskattn import packed_attention
B, N, H, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
def mib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
def call(B, N):
    starts = torch.arange(0, B * N + 1, N, dtype=torch.int32)
    q, k, v = (torch.randn(B * N, H, 64, requires_grad=True) for _ in range(3))
    grad = torch.randn(B * N, H, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = mib("VmRSS")
    out = packed_attention(q, k, v, starts, starts, N, N, impl="cpu")
    results = (out.nbytes + 4 * H * B * N) / 2**20
    forward = mib("VmHWM") - before - results
    out.backward(grad)
    results += 3 * out.nbytes / 2**20
    return forward, mib("VmHWM") - before - results, mib("VmRSS") - before - results
call(1, 64)
print(*call(B, N))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("sequences", "tokens", "heads"), [(1, 16_384, 1), (64, 512, 12)])
def test_memory_beyond_the_results_is_bounded(sequences, tokens, heads):
    threads = 2
    command = [sys.executable, "-c", _PROGRAM, *map(str, (sequences, tokens, heads, threads))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    forward, backward, kept = map(float, printed.split())
    print(f"forward {forward:.1f} MiB, backward {backward:.1f} MiB, kept {kept:.1f} MiB")
    most = BATCH_MIB + threads * (THREAD_MIB + SCRATCH_MIB)
    assert forward < most
    assert backward < most
    assert kept < KEPT_MIB


_HUGE_PAGES = """
import sys, torch
from pathlib import Path
from maskattn import packed_attention
def asks_for_huge_pages(x):
    asked, inside = False, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(end, 16) for end in head.split("-"))
            inside = first <= x.data_ptr() + x.nbytes // 2 < last
        elif inside and head == "VmFlags:":
            asked = "hg" in line.split()
    return asked
def call(tokens):
    starts = torch.arange(0, tokens + 1, 64, dtype=torch.int32)
    q, k, v = (torch.randn(tokens, 2, 64, requires_grad=True) for _ in range(3))
    out = packed_attention(q, k, v, starts, starts, 64, 64, impl="cpu")
    out.backward(torch.ones_like(out))
    return [asks_for_huge_pages(x) for x in (out, q.grad, k.grad, v.grad)]
print(call(64), call(128 * 1024))
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="this system has no huge pages"
)
def test_large_results_ask_for_huge_pages_and_small_ones_do_not() -> None:
    done = subprocess.run([sys.executable, "-c", _HUGE_PAGES], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"{[False] * 4} {[True] * 4}", done.stderr
