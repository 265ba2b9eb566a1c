"""The C++ readout and token relevance beside the machine's copy bandwidth and torch: ``python bench/native_readout.py``.

All that is compared runs in turn, round after round, in one process; medians are printed. "of copy" is the traffic that
an operation needs (K and V once; dk and dv once) over its time, as a share of what copying that much memory reaches.

Dimension key: B sequences, T tokens, R readout queries, H heads, D head width, K classes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from maskattn.attention import native, reference
from maskattn.options import Options

Calls = dict[str, tuple[Callable[[], object], float]]


def medians(calls: Calls, rounds: int) -> dict[str, float]:
    """Seconds of each call, all called once a round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, _) in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def composite(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Readout of one sequence as torch's products and softmax; out (R, H, D) and rows (H, R, T)."""
    scores = q[0].transpose(0, 1) @ k.permute(1, 2, 0) * options.scale
    rows = scores.softmax(-1)
    return (rows @ v.transpose(0, 1)).transpose(0, 1), rows


def readout_calls(T: int, R: int, H: int, D: int, dtype: torch.dtype) -> Calls:
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((1, R, H, D), (T, H, D), (T, H, D)))
    starts, options = torch.tensor([0, T], dtype=torch.int32), Options(D**-0.5)
    once = 2.0 * k.numel() * k.element_size()
    out, lse, _ = native.readout_forward(q, k, v, starts, T, options, True, False)
    grad = torch.randn_like(out)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    into = torch.empty_like(k)

    def torch_both() -> object:
        return torch.autograd.grad(composite(*leaves, options)[0], leaves, grad[0])

    def ours_both() -> object:
        out, lse, _ = native.readout_forward(q, k, v, starts, T, options, True, False)
        return native.readout_backward(grad, None, None, q, k, v, out, lse, starts, T, options)

    return {
        "copy": (lambda: into.copy_(k), once),
        "read": (lambda: k.view(torch.int32).flatten()[: k.numel() * k.element_size() // 4].sum(), once / 2),
        "ours forward": (lambda: native.readout_forward(q, k, v, starts, T, options, True, False), once),
        "ours forward, rows": (lambda: native.readout_forward(q, k, v, starts, T, options, True, True), once),
        "torch forward": (lambda: composite(q, k, v, options), once),
        "ours both": (ours_both, 3 * once),
        "torch both": (torch_both, 3 * once),
    }


def relevance_calls(T: int, R: int, H: int, D: int, K: int, dtype: torch.dtype) -> Calls:
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((1, R, H, D), (T, H, D), (T, H, D)))
    g = torch.randn(K, 1, R, H, D).to(dtype)
    starts, options = torch.tensor([0, T], dtype=torch.int32), Options(D**-0.5)
    out, lse, _ = native.readout_forward(q, k, v, starts, T, options, True, False)
    left, right, into = torch.randn(2000, H * D), torch.randn(H * D, 2000), torch.empty_like(k)
    product = 2.0 * T * R * H * D * K

    def ours() -> Tensor:
        return native.token_relevance(q, k, v, out, lse, g, None, None, starts, T, options)

    return {
        "copy": (lambda: into.copy_(k), 2.0 * k.numel() * k.element_size()),
        "matrix product, float32": (lambda: left @ right, 2.0 * 2000 * 2000 * H * D),
        "ours": (ours, product if K > 100 else 2.0 * k.numel() * k.element_size()),
        "torch": (lambda: reference.token_relevance(q, k, v, g, None, None, starts, options), product),
    }


def show(title: str, calls: Calls, rounds: int) -> None:
    print(f"\n{title}")
    for name, seconds in medians(calls, rounds).items():
        print(f"  {name:26} {1e3 * seconds:9.2f} ms {calls[name][1] / seconds / 1e9:8.1f} GB/s or GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    H, D = 12, 64
    for dtype in (torch.float32, torch.bfloat16):
        for R in (1, 4, 16):
            title = f"readout T={given.tokens} R={R} H={H} D={D} {dtype}, {given.threads} threads"
            show(title, readout_calls(given.tokens, R, H, D, dtype), given.rounds)
        for K in (1, 10, 1000):
            tokens = given.tokens if K < 100 else given.tokens // 10
            title = f"token relevance T={tokens} R=1 H={H} D={D} K={K} {dtype}, {given.threads} threads"
            show(title, relevance_calls(tokens, 1, H, D, K, dtype), given.rounds)


if __name__ == "__main__":
    main()
