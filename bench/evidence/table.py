"""Tables of metrics as Markdown, and pages whose measured sections are written by scripts.

A page marks such a section with ``<!-- measured: NAME -->`` and ``<!-- end -->``; the text between them is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Row", "bar_figure", "markdown_table", "mean_and_error", "write_section"]


@dataclass(frozen=True)
class Row:
    """One contender's metrics.

    Attributes:
        name: name of the contender.
        values: (B,) values of each metric, one for each image.
        costs: single numbers, without a standard error.
    """

    name: str
    values: dict[str, Tensor]
    costs: dict[str, float] = field(default_factory=dict)


def mean_and_error(values_B: Tensor) -> tuple[float, float]:
    """Compute the mean and the standard error of the finite values."""
    values = values_B.double()[values_B.isfinite()]
    if len(values) == 0:
        return float("nan"), float("nan")
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(values.mean()), error


def markdown_table(rows: Sequence[Row], higher: Sequence[str] = (), lower: Sequence[str] = ()) -> str:
    """Return a table of contenders by metrics, with the best of each column (except "random") in bold.

    Args:
        rows: the contenders, all with the same metrics.
        higher, lower: prefixes of the metrics for which higher, or lower, is better.
    """
    metrics = [*rows[0].values, *rows[0].costs]
    lines = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    means = {
        row.name: {m: mean_and_error(row.values[m])[0] if m in row.values else row.costs[m] for m in metrics}
        for row in rows
    }
    best = {}
    for metric in metrics:
        column = {name: values[metric] for name, values in means.items() if name != "random"}
        known = {name: value for name, value in column.items() if value == value}
        if known and metric.startswith(tuple(higher)) and higher:
            best[metric] = max(known, key=known.__getitem__)
        elif known and metric.startswith(tuple(lower)) and lower:
            best[metric] = min(known, key=known.__getitem__)
    for row in rows:
        cells = []
        for metric in metrics:
            if metric in row.values:
                mean, error = mean_and_error(row.values[metric])
                cell = f"{mean:.3f} ± {error:.3f}" if error == error else f"{mean:.3f}"
            else:
                cell = f"{row.costs[metric]:.3g}"
            cells.append(f"**{cell}**" if best.get(metric) == row.name else cell)
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bar_figure(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each metric with a bar for each contender, with standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(rows[0].values)
    columns = min(4, len(metrics))
    panels = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.1 * columns + 1.6, 0.24 * len(rows) * panels + 0.9 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, columns, sharey=True, squeeze=False)
    names = [row.name for row in rows]
    for index, axis in enumerate(axes.flat):
        if index >= len(metrics):
            axis.set_visible(False)
            continue
        spread = [mean_and_error(row.values[metrics[index]]) for row in rows]
        colours = ["#b2182b" if "CDAM" in name else "#999999" for name in names]
        axis.barh(names, [mean for mean, _ in spread], xerr=[error for _, error in spread], color=colours)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_title(metrics[index], fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0, 0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_section(page: Path, name: str, text: str) -> None:
    """Replace the measured section ``name`` of a page, or append it if the page does not have it."""
    start, end = f"<!-- measured: {name} -->", "<!-- end -->"
    content = page.read_text() if page.exists() else ""
    section = f"{start}\n\n{text.strip()}\n\n{end}"
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
    if pattern.search(content):
        content = pattern.sub(lambda _: section, content)
    else:
        content = f"{content.rstrip()}\n\n{section}\n".lstrip()
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(content)


def as_tensor(values: Sequence[float]) -> Tensor:
    """Return a row's values as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)
