"""One slide on one and on several processes of this machine: time, memory, and the ring beside the gathered exchange.

    python -m bench.cpu.context_parallel [TOKENS ...] [--processes W] [--repeats N] [--exchanges NAME ...]

Each row is one attention layer (6 heads of 64 channels, float32) over a single sequence, forward and backward, and the
median of the repeats; the slowest process counts. Every process has one thread, so that two processes have twice the
arithmetic of one. They form a gloo group over the loopback interface. "torch" is
`torch.distributed.tensor.experimental.context_parallel`, whose backward does not run on a CPU; "none" is one process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from maskattn import distributed as together
from maskattn import packed_attention
from maskattn.distributed.choice import cost_of

HEADS, WIDTH = 6, 64
EXCHANGES = ("none", "ring", "gather", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", nargs="*", type=int, default=[8192, 32768])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--exchanges", nargs="+", choices=EXCHANGES, default=EXCHANGES)
    arguments = parser.parse_args()
    count = arguments.processes
    print("| tokens | processes | exchange | s forward | s backward | MiB more at the peak | MiB received |")
    print("|---|---|---|---|---|---|---|")
    for tokens in arguments.tokens:
        for exchange in arguments.exchanges:
            print(row(tokens, 1 if exchange == "none" else count, exchange, arguments.repeats), flush=True)


def row(tokens: int, count: int, exchange: str, repeats: int) -> str:
    """A row of the table, measured in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(one_process, (count, folder, tokens, exchange, repeats), nprocs=count)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(count)]
    forward, backward = (
        statistics.median(max(repeat) for repeat in zip(*(each[name] for each in found), strict=True))
        for name in ("forward", "backward")
    )
    peak = max(each["peak"] for each in found)
    took = "cannot" if exchange == "torch" else f"{backward:.2f}"
    return f"| {tokens:,} | {count} | {exchange} | {forward:.2f} | {took} | {peak:.0f} | {found[0]['received']} |"


def one_process(rank: int, count: int, folder: str, tokens: int, exchange: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.manual_seed(rank)
    timed(128, count, exchange)  # loads what is loaded once
    before, found = _peak_mib(), [timed(tokens // count, count, exchange) for _ in range(repeats)]
    result = {
        "forward": [forward for forward, _ in found],
        "backward": [backward for _, backward in found],
        "peak": _peak_mib() - before,
        "received": received(tokens // count, count, exchange),
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def timed(own: int, count: int, exchange: str) -> tuple[float, float]:
    """The seconds of a forward and a backward pass over ``own`` tokens of each process."""
    if exchange == "torch":
        return timed_torch(own, count), 0.0
    q, k, v = (torch.randn(own, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    shards = shards_of(own)
    dist.barrier()
    start = time.perf_counter()
    if count == 1:
        out = packed_attention(q, k, v, shards.cu_seqlens, shards.cu_seqlens, own, own)
    else:
        out = together.packed_attention(q, k, v, shards, exchange=exchange)
    between = time.perf_counter()
    assert isinstance(out, Tensor)
    out.backward(torch.ones_like(out))
    return between - start, time.perf_counter() - between


def timed_torch(own: int, count: int) -> float:
    # torch divides whole buffers itself; random numbers serve for the other processes' rows.
    whole = [torch.randn(1, HEADS, own * count, WIDTH) for _ in range(3)]
    with torch.no_grad(), context_parallel(init_device_mesh("cpu", (count,)), buffers=whole, buffer_seq_dims=[2, 2, 2]):
        dist.barrier()
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(*whole)
        return time.perf_counter() - start


def shards_of(own: int) -> together.Shards:
    return together.Shards.of(torch.tensor([0, own], dtype=torch.int32))


def received(own: int, count: int, exchange: str) -> str:
    """MiB that a process receives, forward and backward."""
    if exchange == "torch":
        return "not counted"
    shards, row_bytes = shards_of(own), 2 * HEADS * WIDTH * 4
    cost = cost_of(exchange if count > 1 else "gather", shards, shards, row_bytes, row_bytes)
    return f"{cost.forward / 2**20:.0f} + {cost.backward / 2**20:.0f}"


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
