"""The C++ attention compared with torch's, on the CPU.

    python -m bench.cpu.native_attention --out bench/results/native_attention.md       a few minutes on two cores
    python -m bench.cpu.native_attention --threads 1 --instruction-sets avx2 avx512    only these, side by side

Contenders run in interleaved rounds in one process; medians are printed, and ratios of them (above 1 if ours is
faster). With ``--threads 1`` times are processor time, which other work on the machine disturbs less. The machine's
peak is measured first, by a loop of fused multiply-adds and one of bfloat16 products (``peak.cpp``).

Dimension key: B sequences, N tokens, H heads, D head width, f share of the tokens that is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import maskattn
from bench.held_to import TORCH_WITH
from bench.pages import publish
from bench.timing import kind_of_time, median_ratio, medians, rounds_of
from maskattn import Packing, masked_attention, packed_attention
from maskattn.attention.impl import cpu
from maskattn.extension import extension
from maskattn.nn import VisionTransformer

HERE = Path(__file__).parent
Lines = Iterator[str]


# The compiler's flags for the peak of an instruction set.
PEAK_WITH = {
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx2 -mfma",
    "avx512_bf16": "-mavx512f -mavx512vl -mavx512bf16 -mavx2 -mfma",
    "amx_bf16": "-march=native",
}

Size = tuple[int, int, int, int]
SIZES = [(1, n, 6, 64) for n in (256, 1024, 4096, 16_384)] + [(64, 197, 6, 64), (1, 4096, 3, 128), (1, 4096, 8, 48)]
SIZES_OF_SETS = [
    *((1, 256, 6, 64), (1, 1024, 6, 64), (1, 4096, 1, 64), (1, 16_384, 1, 64)),
    *((1, 1024, 6, 32), (1, 4096, 2, 32), (1, 1024, 6, 80), (1, 4096, 1, 80), (1, 1024, 6, 128), (1, 4096, 1, 128)),
    *((16, 197, 6, 64), (16, 197, 12, 80)),
]
SMOKE_SIZES = [(2, 70, 2, 16)]


def processor() -> str:
    """Return the processor's name, with its family and model, which tell a server's generation."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if os.path.exists("/proc/cpuinfo") else []
    facts = dict(reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]))
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def use_only(instruction_set: str) -> None:
    """Have every later call of the extension use this instruction set."""
    native = extension()
    names = [name for name in dir(native) if "attention" in name]
    forced = SimpleNamespace(**{n: partial(getattr(native, n), instruction_set=instruction_set) for n in names})
    cpu.extension = lambda: forced


def machine_peak(flags: str = "-march=native") -> dict[str, float]:
    """Measure the GFLOP/s of one thread by dtype; the result is empty without a compiler or AVX2."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        command = ["g++", "-O3", *flags.split(), "-std=c++17", str(HERE / "peak.cpp"), "-o", str(program)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no peak: {error}", file=sys.stderr)
            return {}
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def backward_of(forward: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """Return a function that runs only the backward; the graph is built once."""
    out = forward(*leaves)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, tokens: int) -> Tensor:
    out = packed_attention(q, k, v, starts, starts, tokens, tokens, impl="cpu")
    assert isinstance(out, Tensor)
    return out


def _torch(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)


def dense_cells(rounds: int, peak: dict[str, float], size: Size, dtype: torch.dtype) -> list[str]:
    """Compare both on the same packed tokens: forward GFLOP/s and ratio, backward GFLOP/s and ratio."""
    B, N, H, D = size
    rows = [torch.randn(B * N, H, D).to(dtype).requires_grad_() for _ in range(3)]
    dense = [x.detach().view(B, N, H, D).transpose(1, 2).contiguous().requires_grad_() for x in rows]
    starts = torch.arange(0, B * N + 1, N, dtype=torch.int32)

    attend = partial(_attend_packed, starts=starts, tokens=N)
    with torch.no_grad():
        forward = rounds_of(
            {"ours": partial(attend, *rows), "torch": partial(_torch, *dense)}, rounds, repeat_short=True
        )
    calls = {"ours": backward_of(attend, rows), "torch": backward_of(_torch, dense)}
    backward = rounds_of(calls, rounds, repeat_short=True)
    flops, name = 4 * B * N * N * H * D, _name_of(dtype)
    rate = flops / statistics.median(forward["ours"]) / 1e9
    share = f" ({rate / (peak[name] * torch.get_num_threads()):.0%})" if name in peak else ""
    return [
        f"{rate:.0f}{share}",
        f"{median_ratio(forward['torch'], forward['ours']):.2f}",
        f"{2.5 * flops / statistics.median(backward['ours']) / 1e9:.0f}",
        f"{median_ratio(backward['torch'], backward['ours']):.2f}",
    ]


def dense_rows(rounds: int, peak: dict[str, float], sizes: list[Size]) -> list[list[str]]:
    """Return the cells of each dtype and size."""
    dtypes = torch.float32, torch.bfloat16
    return [dense_cells(rounds, peak, size, dtype) for dtype in dtypes for size in sizes]


def dense_table(sizes: list[Size], rows_of_sets: dict[str, list[list[str]]]) -> Lines:
    """Show the cells of each instruction set side by side; the name "" stands for the best."""
    yield "## The same packed tokens: ours against torch's scaled_dot_product_attention"
    yield ""
    columns = ("forward GFLOP/s (share of peak)", "ratio", "backward GFLOP/s", "ratio")
    names = [f"{name} {column}".strip() for name in rows_of_sets for column in columns]
    yield "| sequences × tokens | H × D | dtype | " + " | ".join(names) + " |"
    yield "|---|---|---|" + "---:|" * len(names)
    kinds = [(dtype, size) for dtype in (torch.float32, torch.bfloat16) for size in sizes]
    for (dtype, (B, N, H, D)), *cells in zip(kinds, *rows_of_sets.values(), strict=True):
        yield f"| {B} × {N:,} | {H} × {D} | {_name_of(dtype)} | " + " | ".join(chain(*cells)) + " |"
    yield ""


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows_in_own_process(instruction_set: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the peak and the cells of an instruction set, from a process in which torch has no more either."""
    command = [sys.executable, "-m", "bench.cpu.native_attention", "--only", instruction_set]
    command += ["--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
    command += ["--smoke"] if arguments.smoke else []
    environment = os.environ | TORCH_WITH[instruction_set]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def masked_table(rounds: int, tokens: int) -> Lines:
    """Compare them on dense tensors with a random mask."""
    yield f"## A random mask on {tokens:,} tokens (6 heads of width 64): against torch with the bool mask"
    yield ""
    yield "| dtype | f | masked_attention | packed_attention | torch, bool mask | ratio masked | ratio packed | 1/f² |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, 6, tokens, 64).to(dtype) for _ in range(3))
        for kept in (0.06, 0.3, 0.5, 1.0):
            keep = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0)) < kept
            packing = Packing.from_keep(keep)
            rows = [x.transpose(1, 2).flatten(0, 1)[packing.indices].clone() for x in (q, k, v)]
            where = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
            calls = {
                "masked": partial(masked_attention, q, k, v, keep, impl="cpu"),
                "packed": partial(packed_attention, *rows, *where, impl="cpu"),
                "torch": partial(_torch, q, k, v, attn_mask=keep[:, None, None, :]),
            }
            with torch.no_grad():
                took = medians(calls, rounds)
            times = " | ".join(f"{1e3 * took[name]:.1f} ms" for name in calls)
            masked, packed = (took["torch"] / took[name] for name in ("masked", "packed"))
            name = str(dtype).removeprefix("torch.")
            least = (tokens / packing.total) ** 2  # 1/f² of the tokens that this mask keeps
            yield f"| {name} | {kept} | {times} | {masked:.1f} | {packed:.1f} | {least:.1f} |"
    yield ""


def model_table(rounds: int) -> Lines:
    """Compare complete models with our attention and with torch's."""
    yield '## Inside models: impl "cpu" against impl "torch"'
    yield ""
    yield "| model | what | ours | torch's attention | ratio |"
    yield "|---|---|---:|---:|---:|"
    torch.manual_seed(0)
    models = {
        impl: VisionTransformer(embed_dim=384, num_heads=6, num_classes=10, impl=impl) for impl in ("cpu", "torch")
    }
    x = torch.randn(8, 3, 224, 224)

    def predict(model: VisionTransformer, keep: Tensor | None) -> None:
        with torch.no_grad():
            model(x, keep)

    def step(model: VisionTransformer, keep: Tensor | None) -> None:
        model.zero_grad()
        model(x, keep).square().mean().backward()

    for kept in (1.0, 0.3):
        keep = None if kept == 1 else torch.rand(8, 14, 14) < kept
        for name, run in (("forward", predict), ("training step", step)):
            took = medians({i: lambda m=m, run=run, keep=keep: run(m, keep) for i, m in models.items()}, rounds)
            yield _model_row(f"ViT-S/16, 8 images of 224 px, f = {kept:.1f}", name, took)
    slide = {
        impl: VisionTransformer(
            img_size=64, patch_size=1, in_chans=8, embed_dim=384, depth=4, num_heads=6, num_classes=2, impl=impl
        )
        for impl in ("cpu", "torch")
    }
    tiles, keep = torch.randn(1, 8, 64, 128), torch.ones(1, 64, 128, dtype=torch.bool)
    for model in slide.values():
        model.dynamic_img_size = True
    for name, grad in (("forward", False), ("training step", True)):

        def run_slide(model: VisionTransformer, grad: bool = grad) -> None:
            with torch.set_grad_enabled(grad):
                out = model(tiles, keep)
                if grad:
                    model.zero_grad()
                    out.square().mean().backward()

        took = medians({i: lambda m=m, r=run_slide: r(m) for i, m in slide.items()}, max(2, rounds // 2))
        yield _model_row("slide encoder, 4 blocks of 384, 8,192 tiles", name, took)
    yield ""


def _model_row(model: str, what: str, took: dict[str, float]) -> str:
    return f"| {model} | {what} | {took['cpu']:.3f} s | {took['torch']:.3f} s | {took['torch'] / took['cpu']:.2f} |"


# The peak is reset before the run, since it would include importing torch and the memory of the parent process.
_GROWTH = """
import time, torch
from maskattn import packed_attention
torch.set_num_threads({threads})
def run(n):
    q, k, v = (torch.randn(n, 6, 64, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, n], dtype=torch.int32)
    start = time.perf_counter()
    packed_attention(q, k, v, starts, starts, n, n, impl="cpu").sum().backward()
    return time.perf_counter() - start
def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
run(64)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
first = run({tokens})
after = memory("VmHWM")
print(min(first, run({tokens}), run({tokens})), after - before)
"""


def growth_table(rounds: int) -> Lines:
    """Measure time and memory of forward and backward for growing numbers of kept tokens."""
    yield "## Growth with kept tokens: forward and backward, 6 heads of width 64, float32"
    yield ""
    yield "| kept tokens | time | peak memory beyond the start |"
    yield "|---:|---:|---:|"
    for tokens in (1024, 2048, 4096, 8192, 16_384):
        program = _GROWTH.format(threads=torch.get_num_threads(), tokens=tokens)
        results = [
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
            for _ in range(3)
        ]
        seconds, mib = (statistics.median(float(r[i]) for r in results) for i in (0, 1))
        yield f"| {tokens:,} | {seconds:.3f} s | {mib:.0f} MiB |"
    yield ""


def page(arguments: argparse.Namespace, rounds: int) -> Lines:
    """Print all tables, or the one that shows instruction sets side by side."""
    yield "# The C++ attention beside torch's"
    yield ""
    threads = f"{arguments.threads} thread" + "s" * (arguments.threads > 1)
    yield (
        f"torch {torch.__version__}, maskattn {maskattn.__version__}, {threads}, medians of {rounds} interleaved "
        f"rounds, {kind_of_time()}, {date.today()}."
    )
    yield f"Processor: {processor()}; instruction sets: {', '.join(extension().instruction_sets())}."
    if arguments.instruction_sets:
        found = {name: rows_in_own_process(name, arguments) for name in arguments.instruction_sets}
        for name, of_set in found.items():
            yield f"{name}: {_peak_line(of_set['peak'])}; torch's capability {of_set['torch']}."
        yield ""
        sizes = SMOKE_SIZES if arguments.smoke else SIZES_OF_SETS
        yield from dense_table(sizes, {name: of_set["rows"] for name, of_set in found.items()})
        return
    peak = {} if arguments.smoke else machine_peak()
    sizes = SMOKE_SIZES if arguments.smoke else SIZES
    yield f"{_peak_line(peak)}."
    yield ""
    yield from dense_table(sizes, {"": dense_rows(rounds, peak, sizes)})
    yield from masked_table(rounds, 128 if arguments.smoke else 4096)
    if not arguments.smoke:
        yield from model_table(rounds)
        yield from growth_table(rounds)


def _peak_line(peak: dict[str, float]) -> str:
    rates = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in peak.items())
    return "peak of one thread " + (rates or "not measured")


def main() -> None:
    """Print the tables, and write them to a file if one is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that the bench runs")
    parser.add_argument("--instruction-sets", nargs="+", choices=TORCH_WITH, help="compare only these, side by side")
    parser.add_argument("--only", choices=TORCH_WITH, help=argparse.SUPPRESS)  # a process of --instruction-sets
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = 1 if arguments.smoke else arguments.rounds
    if arguments.only:
        use_only(arguments.only)
        peak = {} if arguments.smoke else machine_peak(PEAK_WITH[arguments.only])
        rows = dense_rows(rounds, peak, SMOKE_SIZES if arguments.smoke else SIZES_OF_SETS)
        print(json.dumps({"peak": peak, "torch": torch.backends.cpu.get_cpu_capability(), "rows": rows}))
    else:
        publish(page(arguments, rounds), arguments.out)


if __name__ == "__main__":
    main()
