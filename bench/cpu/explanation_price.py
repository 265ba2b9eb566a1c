"""The cost of a map relative to the prediction that it explains: every method of the last block, all classes at once.

    OMP_WAIT_POLICY=passive python -m bench.cpu.explanation_price --page docs/methods.md

The model is a ViT-S/16 of 12 blocks with random weights in float32, with all tokens kept. A block and each method's
tail (from the last block's input to the maps) are timed separately in interleaved rounds, and the minimum over rounds
counts. A prediction is 11 blocks and the last block's read; a prediction with maps adds the method's tail. Only ratios
are worth quoting; a length whose block takes longer than the limit is measured once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.evidence.table import write_section
from maskattn.explain import METHODS
from maskattn.explain.explainer import TokenExplainer
from maskattn.nn import VisionTransformer
from maskattn.nn.packed_tokens import PackedTokens

__all__ = ["price", "table"]

BLOCKS = 12


def price(tokens: int, classes: int, rounds: int, limit: float, width: int = 384) -> dict[str, float]:
    """Measure the seconds of "block", "read" and each method's tail, by name.

    Args:
        tokens: number of grid tokens, a square number.
        classes: K.
        rounds: number of measurements.
        limit: seconds of a block above which one measurement must suffice.
        width: number of channels.
    """
    side = round(tokens**0.5)
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=side, patch_size=1, embed_dim=width, depth=2, num_heads=width // 64, num_classes=classes
    ).eval()
    with torch.no_grad():
        rows = model.embed(torch.randn(1, 3, side, side))
    calls: dict[str, Callable[[], object]] = {
        "block": lambda: model.blocks[0](rows.rows_TC, rows),
        "read": lambda: model.predict(rows),
    }
    for method in METHODS.values():
        explainer = method(model) if not method.compared else None
        if isinstance(explainer, TokenExplainer) and method.name not in ("smooth", "integrated"):
            calls[method.name] = _tail(explainer, model, rows)
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            with torch.no_grad():
                call()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
        if best["block"] > limit:
            break
    return best


def _tail(explainer: TokenExplainer, model: VisionTransformer, rows: PackedTokens) -> Callable[[], object]:
    return lambda: explainer.relevance(model, rows, "all")


def table(found: dict[int, dict[str, float]], classes: int) -> str:
    """Format a row for each method with the cost of a prediction with its maps, in predictions."""
    lengths = list(found)
    lines = [
        "| prediction with maps, in predictions | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name in next(iter(found.values())):
        if name in ("block", "read"):
            continue
        cells = []
        for n in lengths:
            prediction = (BLOCKS - 1) * found[n]["block"] + found[n]["read"]
            cells.append(f"{1 + found[n][name] / prediction:.3f}")
        lines.append(f"| {METHODS[name].title} | " + " | ".join(cells) + " |")
    return f"ViT-S/16 of {BLOCKS} blocks, {classes} classes at once, two threads.\n\n" + "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 4096, 65536])
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, help="write the table into this page, e.g. docs/methods.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {n: price(n, arguments.classes, arguments.rounds, arguments.limit) for n in arguments.tokens}
    text = table(found, arguments.classes)
    print(text)
    if arguments.page is not None:
        write_section(arguments.page, "price", text)


if __name__ == "__main__":
    main()
