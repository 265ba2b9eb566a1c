"""Time and memory of CDAM for all classes, against autograd for each class and against a full backward for each.

    python bench/explanation_speed.py                                   # CPU, one thread
    python bench/explanation_speed.py --device cuda --tokens 197 1024 4096 16384 65536 --classes 10 1000

Contenders of one length run in turn, round after round, in one process; a time is the least of its rounds, and only the
ratios are worth quoting. What would take longer than the limit, judged by the length before it, is left out and named.
Every contender runs on the same packed attention, so that the ratios are those of the method, not of the kernels.

- closed form: CDAM's tail, last block to maps, for all K classes at once
- autograd, one row: the same tail, a backward through the class token's attention row for each class
- autograd, block: a backward through the whole last block for each class
- CDAM: backbone and tail
- backward a class: the authors' way, a graph through the whole model and a full backward for each class
- Smooth, Integrated: backbone and 50 tails, one class
- 50 full passes: forward and backward through the whole model; one is timed and counted 50 times
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from evidence_table import write_section
from torch import Tensor

from maskattn.explain import CDAM, IntegratedCDAM, SmoothCDAM
from maskattn.explain.token_scores import score_tokens_by_autograd, score_tokens_in_closed_form
from maskattn.nn import VisionTransformer
from maskattn.nn.packed_tokens import PackedTokens

PAIRS = (
    ("closed form", "autograd, one row"),
    ("closed form", "autograd, block"),
    ("CDAM", "backward a class"),
    ("Smooth", "50 full passes"),
    ("Integrated", "50 full passes"),
)
PATCH_PX = 2


@dataclass
class Measured:
    """Least seconds and largest extra memory (MiB) of a contender's rounds."""

    seconds: float = float("inf")
    mebibytes: float = 0.0


def new_model(classes: int, width: int, depth: int, side: int, device: str) -> VisionTransformer:
    """A class-token ViT with heads of 64 channels."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=side * PATCH_PX,
        patch_size=PATCH_PX,
        in_chans=1,
        num_classes=classes,
        embed_dim=width,
        depth=depth,
        num_heads=width // 64,
    )
    return model.to(device).eval()


def backward_a_class(model: VisionTransformer, x: Tensor, classes: range) -> Tensor:
    """The authors' way: S from the gradient that a hook sees at the last block's first norm."""
    seen: list[Tensor] = []

    def keep_gradient(module: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    hook = model.last_block.norm1.register_forward_hook(keep_gradient)
    try:
        logits, maps = model(x), []
        for c in classes:
            model.zero_grad()
            seen[0].grad = None
            logits[:, c].sum().backward(retain_graph=c + 1 < classes.stop)
            maps.append((seen[0] * seen[0].grad).sum(dim=1).detach())
    finally:
        hook.remove()
        model.zero_grad()
    return torch.stack(maps)


def autograd_of_the_row(model: VisionTransformer, tokens: PackedTokens) -> Tensor:
    """CDAM's tail without the closed form: a backward through keys, values and one attention row for each class."""
    block = model.last_block
    normed = block.norm1(tokens.rows_TC).detach().requires_grad_()
    read = block.read_attention(tokens, normed)
    logits = model.predict_from_class_token(block.finish(tokens, read.out_B1HD))
    maps = []
    for c in range(model.num_classes):
        (gradient,) = torch.autograd.grad(logits[:, c].sum(), normed, retain_graph=c + 1 < model.num_classes)
        maps.append((normed.detach() * gradient).sum(dim=1))
    return torch.stack(maps)


def contenders(model: VisionTransformer, x: Tensor, m: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Calls by name, and how often each counts."""
    with torch.no_grad():
        tokens = model.embed(x)  # tails start here: what is in the tokens does not change their time
    size = max(1, min(m, 2**17 // x[0, 0].numel() * PATCH_PX**2))
    return {
        "closed form": (lambda: score_tokens_in_closed_form(model, tokens, "all"), 1),
        "autograd, one row": (lambda: autograd_of_the_row(model, tokens), 1),
        "autograd, block": (lambda: score_tokens_by_autograd(model, tokens, "all"), 1),
        "CDAM": (lambda: CDAM(model).attribute(x, "all"), 1),
        "backward a class": (lambda: backward_a_class(model, x, range(model.num_classes)), 1),
        "Smooth": (lambda: SmoothCDAM(model, m, internal_batch_size=size).attribute(x, 0), 1),
        "Integrated": (lambda: IntegratedCDAM(model, m, internal_batch_size=size).attribute(x, 0), 1),
        "50 full passes": (lambda: backward_a_class(model, x, range(1)), m),
    }


def measure(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds and extra MiB of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else what an earlier call freed would be used again and not be counted
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again from here
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")
    return seconds, max(peak - before, 0) / 2**20


def _resident(field: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) * 1024


def run(
    lengths: list[int], classes: int, arguments: argparse.Namespace
) -> tuple[dict[int, dict[str, Measured]], list[str]]:
    """Every length, shortest first; what was left out is named."""
    results: dict[int, dict[str, Measured]] = {}
    left_out = []
    last: dict[str, tuple[int, float]] = {}
    for length in sorted(lengths):
        side = round((length - 1) ** 0.5)
        tokens = side * side + 1
        model = new_model(classes, arguments.width, arguments.depth, side, arguments.device)
        x = torch.randn(1, 1, side * PATCH_PX, side * PATCH_PX, device=arguments.device)
        calls = contenders(model, x, arguments.m)
        found: dict[str, Measured] = {}
        for turn in range(arguments.rounds + 1):  # the first is a trial
            for name, (call, times) in calls.items():
                before, seconds_before = last.get(name, (tokens, 0.0))
                if turn == 0 and seconds_before / times * (tokens / before) ** 2 > arguments.limit:
                    left_out.append(f"{name} at {tokens} tokens and {classes} classes")
                    continue
                if turn and name not in found:
                    continue
                seconds, mebibytes = measure(call, arguments.device)
                one = found.setdefault(name, Measured())
                if turn or seconds > arguments.limit / 4:
                    one.seconds = min(one.seconds, seconds * times)
                one.mebibytes = max(one.mebibytes, mebibytes)
        last |= {name: (tokens, one.seconds) for name, one in found.items()}
        results[tokens] = found
        print(f"{tokens} tokens, {classes} classes: measured", flush=True)
    return results, left_out


def table(results: dict[int, dict[str, Measured]], classes: int) -> str:
    """Markdown: a row for each pair and length, and how many times as long and as large theirs is."""
    lines = ["| ours | theirs | tokens | ours | theirs | time | memory |", "|---" * 7 + "|"]
    for ours, theirs in PAIRS:
        for tokens, found in results.items():
            one, other = found.get(ours), found.get(theirs)
            ratios = ["–", "–"]
            if one is not None and other is not None:
                memory = f"{other.mebibytes / one.mebibytes:.1f}×" if one.mebibytes >= 1 else "–"
                ratios = [f"{other.seconds / one.seconds:.1f}×", memory]
            lines.append(f"| {' | '.join([ours, theirs, str(tokens), _cell(one), _cell(other), *ratios])} |")
    return f"{classes} classes; seconds and extra MiB:\n\n" + "\n".join(lines)


def _cell(one: Measured | None) -> str:
    return "left out" if one is None else f"{one.seconds:.3g} s, {one.mebibytes:.0f} MiB"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 1025, 4097, 16385, 65537])
    parser.add_argument("--classes", type=int, nargs="+", default=[10])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--m", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that one call may take")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--page", type=Path, help="write the table into this page, e.g. docs/evidence.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = [f"A ViT of width {arguments.width} and depth {arguments.depth}, one image, {arguments.device}."]
    for classes in arguments.classes:
        results, left_out = run(arguments.tokens, classes, arguments)
        parts.append(table(results, classes))
        if left_out:
            parts.append(f"Left out, over {arguments.limit:g} s: {'; '.join(left_out)}.")
    text = "\n\n".join(parts)
    print(text)
    if arguments.page is not None:
        write_section(arguments.page, "speed", text)


if __name__ == "__main__":
    main()
