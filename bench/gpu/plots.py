"""Plots of a run: speed against length, time against the kept share, and the cost of options.

python -m bench.gpu.plots rows.csv out_folder
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.gpu.record import Row, is_ours, read_rows

# Okabe and Ito's colours, which colour-blind people can distinguish, with markers, so that colour is never needed.
STYLES = {
    "maskattn packed, triton": ("#D55E00", "o"),
    "maskattn masked, triton": ("#E69F00", "s"),
    "maskattn packed, cpu": ("#D55E00", "o"),
    "maskattn masked, cpu": ("#E69F00", "s"),
    "maskattn packed, torch": ("#CC79A7", "h"),
    "maskattn masked, torch": ("#B39DDB", "H"),
    "sdpa per sequence": ("#0072B2", "^"),
    "sdpa bool mask": ("#56B4E9", "v"),
    "sdpa unmasked": ("#999999", "x"),
    "varlen_attn": ("#009E73", "D"),
    "flash-attn": ("#004D40", "P"),
    "xformers": ("#8C564B", "X"),
    "flex": ("#F0E442", "d"),
    "nested": ("#000000", "+"),
}
DIRECTIONS = {"forward": "forward", "backward": "backward alone", "both": "forward and backward"}


def series_of(contender: str) -> str:
    """Return the line of a contender; all backends and versions of a peer share one, with the best at each point."""
    if is_ours(contender):
        return contender
    return next((name for name in STYLES if contender.startswith(name)), contender)


def best_by_series(rows: Iterable[Row], along: str) -> dict[str, dict[float, Row]]:
    """Return the fastest row by series and value along the axis."""
    series: dict[str, dict[float, Row]] = defaultdict(dict)
    for row in rows:
        points = series[series_of(row.contender)]
        x = getattr(row, along)
        if x not in points or row.p50_ms < points[x].p50_ms:
            points[x] = row
    order = list(STYLES)
    return dict(sorted(series.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def speed_against_length(rows: list[Row], folder: Path) -> list[Path]:
    """Plot a figure for each head width, kept share and dtype with several lengths, with a panel for each direction."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.width, row.kept, row.dtype].append(row)
    paths = []
    for (width, kept, dtype), group in groups.items():
        # The largest batch of each length.
        batches = {row.tokens: max(other.batch for other in group if other.tokens == row.tokens) for row in group}
        group = [row for row in group if row.batch == batches[row.tokens]]
        if len(batches) < 3:
            continue
        unit = 1 if max(row.tflops for row in group) > 2 else 1e-3
        figure, panels = _panels([row.direction for row in group])
        for axes, direction in panels:
            here = [row for row in group if row.direction == direction]
            for name, points in best_by_series(here, "tokens").items():
                lengths = sorted(points)
                _line(axes, lengths, [points[n].tflops / unit for n in lengths], name)
            axes.set(
                title=DIRECTIONS[direction], xlabel="tokens of a sequence, × sequences", xscale="log", yscale="log"
            )
            _ticks(axes, {n: f"{_short(n)}\n×{batches[n]}" for n in {row.tokens for row in here}})
        panels[0][0].set_ylabel(f"{'TFLOP/s' if unit == 1 else 'GFLOP/s'} over kept tokens")
        title = f"Attention of masked sequences: head width {width}, {kept:.0%} of the tokens kept, {dtype}"
        paths.append(_save(figure, title, group[0], folder / f"speed_d{width}_f{kept:g}_{dtype}.png"))
    return paths


def time_against_share(rows: list[Row], folder: Path) -> list[Path]:
    """Plot the speed-up over the best bool mask against the kept share, with 1/f², the ratio of the scores' numbers."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.batch, row.tokens, row.width, row.dtype].append(row)
    paths = []
    for (batch, tokens, width, dtype), group in groups.items():
        if len({row.kept for row in group}) < 3:
            continue
        figure, panels = _panels([row.direction for row in group])
        for axes, direction in panels:
            series = best_by_series([row for row in group if row.direction == direction], "kept")
            masked = series.pop("sdpa bool mask", {})
            shares = sorted(masked)
            if not shares:
                continue
            axes.plot(
                shares, [share**-2 for share in shares], "k--", linewidth=1.2, label="1/f²: as fast for each score"
            )
            axes.axhline(1, color="#56B4E9", linewidth=1.2, label="sdpa bool mask")
            for name, points in series.items():
                both = [share for share in shares if share in points]
                _line(axes, both, [masked[share].p50_ms / points[share].p50_ms for share in both], name)
            axes.set(title=DIRECTIONS[direction], xlabel="kept share f of the tokens", xscale="log", yscale="log")
            _ticks(axes, {share: f"{share:g}" for share in shares})
            axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}×"))
        panels[0][0].set_ylabel("times faster than sdpa with a bool mask")
        title = f"What masking saves: {batch} × {tokens:,} tokens, head width {width}, {dtype}"
        paths.append(_save(figure, title, group[0], folder / f"share_{batch}x{tokens}_d{width}_{dtype}.png"))
    return paths


def cost_of_options(rows: list[Row], folder: Path) -> list[Path]:
    """Plot the time of our attention with each option over its time without."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if is_ours(row.contender):
            groups[row.batch, row.tokens, row.kept, row.width, row.dtype].append(row)
    paths = []
    for (batch, tokens, kept, width, dtype), group in groups.items():
        figure, panels = _panels([row.direction for row in group])
        for axes, direction in panels:
            here = {(row.variant, row.contender): row.p50_ms for row in group if row.direction == direction}
            variants = list(dict.fromkeys(variant for variant, _ in here if variant != "plain"))
            names = list(dict.fromkeys(name for _, name in here))
            for number, name in enumerate(names):
                ratios = [here.get((variant, name), 0) / here["plain", name] for variant in variants]
                offsets = [i + 0.8 * (number + 0.5) / len(names) - 0.4 for i in range(len(variants))]
                bars = axes.barh(offsets, ratios, 0.8 / len(names), color=STYLES[name][0], label=name)
                axes.bar_label(bars, [f"{ratio:.3g}×" for ratio in ratios], padding=2, fontsize=8)
            axes.axvline(1, color="black", linewidth=1)
            axes.set(title=DIRECTIONS[direction], xlabel="time over that without options", yticks=range(len(variants)))
            axes.set_yticklabels(variants)
            axes.set_xscale("log" if max(here.values()) > 10 * min(here.values()) else "linear")
            axes.margins(x=0.2)
        # The panels share the axis.
        panels[0][0].invert_yaxis()
        title = f"What options cost: {batch} × {tokens:,} tokens, {kept:.0%} kept, head width {width}, {dtype}"
        paths.append(_save(figure, title, group[0], folder / f"options_{batch}x{tokens}_d{width}_{dtype}.png"))
    return paths


def _panels(present: list[str]) -> tuple[plt.Figure, list[tuple[Axes, str]]]:
    directions = [direction for direction in DIRECTIONS if direction in present]
    figure, axes = plt.subplots(
        1, len(directions), figsize=(4.6 * len(directions) + 1, 5.2), squeeze=False, sharey=True
    )
    return figure, list(zip(axes[0], directions, strict=True))


def _line(axes: Axes, x: list[float], y: list[float], name: str) -> None:
    colour, marker = STYLES.get(name, ("#666666", "."))
    ours = is_ours(name)
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker,
        markersize=6,
        linewidth=2.4 if ours else 1.4,
        label=name,
        zorder=3 if ours else 2,
    )


def _short(tokens: int) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else str(tokens)


def _ticks(axes: Axes, labels: dict[float, str]) -> None:
    axes.set_xticks(list(labels), list(labels.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: plt.Figure, title: str, row: Row, path: Path) -> Path:
    """Save the figure with one legend for all panels, and the machine and versions at the bottom."""
    labels: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.suptitle(title, fontsize=12)
    figure.text(0.01, 0.01, f"{row.device}; torch {row.torch}, commit {row.commit}", fontsize=7.5, color="#555555")
    figure.tight_layout(rect=(0, 0.16, 1, 0.98))
    columns = min(len(labels), 4 if len(figure.axes) > 1 else 3)
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="lower center",
        bbox_to_anchor=(0.5, 0.03),
        ncols=columns,
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Make every plot for which there are enough rows."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = [row for row in rows if row.status == "ok"]
    attention = [row for row in measured if row.family == "attention"]
    options = [row for row in measured if row.family == "options"]
    return [
        *speed_against_length(attention, folder),
        *time_against_share(attention, folder),
        *cost_of_options(options, folder),
    ]


def main() -> None:
    """Plot a CSV of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for path in plot(read_rows(arguments.rows), arguments.folder):
        print(path)


if __name__ == "__main__":
    main()
