"""The C++ readout and token relevance compared with plain copies in memory, and with torch.

    python -m bench.cpu.native_readout --out bench/results/native_readout.md      about two minutes

Contenders run in interleaved rounds in one process. Medians are printed, with the GB/s of the traffic that the
operation needs (K and V once; K, V, dk and dv once for backward) and its ratio to the first row's. With one thread,
times are processor time, which other work on the machine disturbs less.

Dimension key: B sequences, T tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.pages import publish
from bench.timing import kind_of_time, medians
from maskattn import _native
from maskattn.attention import reference
from maskattn.options import Options

Calls = dict[str, tuple[Callable[[], object], float]]


def array(x: Tensor) -> np.ndarray:
    """Return an array with the same memory; bfloat16 is returned as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def composite(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the readout of one sequence by torch's products and softmax: out (R, H, D) and rows (H, R, T)."""
    scores = q[0].transpose(0, 1) @ k.permute(1, 2, 0) * options.scale
    rows = scores.softmax(-1)
    return (rows @ v.transpose(0, 1)).transpose(0, 1), rows


def readout_calls(T: int, R: int, H: int, D: int, dtype: torch.dtype) -> Calls:
    """Return the calls to time; outputs are allocated once, so that only torch's rows include page faults."""
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((1, R, H, D), (T, H, D), (T, H, D)))
    out, lse, rows, into = torch.empty_like(q), torch.empty(1, R, H), torch.empty(R, H, T), torch.empty_like(k)
    grad, *grads = (torch.randn_like(x) for x in (q, q, k, v))
    starts, options = np.array([0, T], np.int32), Options(D**-0.5)
    inputs, results, how = (
        [array(x) for x in (q, k, v)],
        (array(out), lse.numpy()),
        {"threads": torch.get_num_threads()},
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    once = 2.0 * k.numel() * k.element_size()

    def forward(**also: np.ndarray) -> None:
        _native.readout_forward(*inputs, starts, *results, scale=options.scale, **also, **how)

    def backward() -> None:
        _native.readout_backward(
            *(array(grad), *inputs, *results, starts, *(array(x) for x in grads)), scale=options.scale, **how
        )

    forward()
    return {
        "copy": (lambda: into.copy_(k), once),
        "ours, forward": (forward, once),
        "ours, forward with rows": (lambda: forward(rows=rows.numpy()), once),
        "torch, forward": (lambda: composite(q, k, v, options), once),
        "ours, backward": (backward, 2 * once),
        "torch, both": (lambda: torch.autograd.grad(composite(*leaves, options)[0], leaves, grad[0]), 3 * once),
    }


def relevance_calls(T: int, R: int, H: int, D: int, K: int, dtype: torch.dtype) -> Calls:
    """Return the calls to time; for many classes they count operations, beside torch's float32 matrix product."""
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((1, R, H, D), (T, H, D), (T, H, D)))
    g, into, result = torch.randn(K, 1, R, H, D).to(dtype), torch.empty_like(k), torch.empty(K, T)
    out, lse = torch.empty_like(q), torch.empty(1, R, H)
    starts, options = np.array([0, T], np.int32), Options(D**-0.5)
    inputs, results, how = (
        [array(x) for x in (q, k, v)],
        (array(out), lse.numpy()),
        {"threads": torch.get_num_threads()},
    )
    _native.readout_forward(*inputs, starts, *results, scale=options.scale, **how)
    left, right = torch.randn(1000, H * D), torch.randn(H * D, 1000)
    once, product = 2.0 * k.numel() * k.element_size(), 2.0 * T * R * H * D * K

    def ours() -> None:
        _native.token_relevance(*inputs, *results, array(g), starts, result.numpy(), scale=options.scale, **how)

    def composed() -> Tensor:
        return reference.token_relevance(q, k, v, g, None, None, torch.from_numpy(starts), options)

    compute = K >= 100
    first = (lambda: left @ right, 2e6 * H * D) if compute else (lambda: into.copy_(k), once)
    work = product if compute else once
    return {"matrix product" if compute else "copy": first, "ours": (ours, work), "torch": (composed, work)}


def table(title: str, calls: Calls, rounds: int) -> Iterator[str]:
    """Format a table with a row for each call."""
    seconds = medians({name: call for name, (call, _) in calls.items()}, rounds)
    speeds = {name: calls[name][1] / seconds[name] / 1e9 for name in calls}
    unit, first = ("GB/s" if "copy" in calls else "GFLOP/s"), next(iter(speeds))
    yield f"| {title} | ms | {unit} | of {first} |"
    yield "|---|---:|---:|---:|"
    for name, speed in speeds.items():
        yield f"| {name} | {1e3 * seconds[name]:.2f} | {speed:.1f} | {speed / speeds[first]:.2f} |"
    yield ""


def tables(tokens: int, threads: int, rounds: int) -> Iterator[str]:
    """Yield the tables of both dtypes, for several numbers of queries and of classes."""
    H, D = 12, 64
    yield "# The C++ readout and token relevance beside what the machine copies, and beside torch"
    yield ""
    yield f"torch {torch.__version__}, {threads} threads, medians of {rounds} interleaved rounds, {kind_of_time()}."
    yield f"{H} heads of width {D}; GB/s of K and V read once, and dk and dv written once backward."
    yield ""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for R in (1, 5, 16):
            calls = readout_calls(tokens, R, H, D, dtype)
            yield from table(f"readout, {tokens:,} keys, R = {R}, {name}", calls, rounds)
        for K in (1, 10, 1000):
            keys = tokens if K < 100 else tokens // 10
            calls = relevance_calls(keys, 1, H, D, K, dtype)
            yield from table(f"token relevance, {keys:,} keys, K = {K}, {name}", calls, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    publish(tables(given.tokens, given.threads, given.rounds), given.out)


if __name__ == "__main__":
    main()
