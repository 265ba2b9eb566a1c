"""The kernels on torch's OpenMP threads: the same bits as on their own, and in a child of fork() too."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("maskattn._native")

PROGRAM = """
import os
from pathlib import Path
import numpy as np
import torch
from maskattn import _native

rng = np.random.default_rng(0)
q, k, v, grad = (rng.standard_normal((700, 3, 32), np.float32) for _ in range(4))
starts = np.array([0, 600, 601, 700], np.int32)

def run(threads):
    out, lse = np.empty_like(q), np.empty((3, 700), np.float32)
    _native.attention_forward(q, k, v, starts, starts, out, lse, scale=0.2, threads=threads)
    grads = [np.empty_like(q) for _ in range(3)]
    _native.attention_backward(grad, q, k, v, out, lse, starts, starts, *grads, scale=0.2, threads=threads)
    return b"".join(x.tobytes() for x in (out, lse, *grads))

alone = run(1)
assert all(run(threads) == alone for threads in (2, 3))
assert not _native.share_team("no such file")
files = [file for folder in ("torch/lib", "torch.libs") for file in
         sorted((Path(torch.__file__).parents[1] / folder).glob("libgomp*.so*"))]
shared = any(_native.share_team(str(file)) for file in files)
(torch.randn(500, 500) @ torch.randn(500, 500)).sum()
assert all(run(threads) == alone for threads in (1, 2, 3, 2, 5) for _ in range(5))
child = os.fork()
if child == 0:
    os._exit(0 if run(2) == alone else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert run(2) == alone
print("shared" if shared else "no team")
"""


def test_the_same_bits_on_torchs_threads_and_in_a_forked_child():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "no team":
        pytest.skip("this torch brings no GNU OpenMP runtime of its own")
