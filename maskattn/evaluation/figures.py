"""The report's figures: ROC, precision-recall, confusion, reliability, Kaplan-Meier, predicted against true values.

The colours are Okabe and Ito's palette, which people with any kind of colour vision can distinguish, and curves also
differ in line style. pyplot is not used, because it has global state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from maskattn.evaluation.calibration import reliability_of
from maskattn.evaluation.metrics import present_classes
from maskattn.evaluation.predictions import Predictions
from maskattn.evaluation.results import Evaluation
from maskattn.evaluation.survival_curves import log_rank, risk_groups
from maskattn.lettering import families_of, legible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INK", "Drawn", "draw_figures", "p_text"]

INK = "#1c1f23"  # the report's text colour; in the page it is replaced by that of the light or dark theme
_QUIET = "#8b929b"  # visible on white and on black
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_LINES = ("-", "--", "-.", ":")
_SIZE_INCH = (4.8, 4.5)
_MOST_CURVES = 12
_MOST_NUMBERED = 12  # largest number of classes for which a confusion matrix has numbers in its cells
_LONGEST = 18


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: name of its file, without suffix.
        title: its caption.
        alt: its alternative text.
        figure: the figure of matplotlib.
    """

    name: str
    title: str
    alt: str
    figure: Figure


def draw_figures(evaluations: Sequence[Evaluation]) -> list[Drawn]:
    """Draw the figures of models with one task; for two classes, the curves of all models share their axes."""
    task = evaluations[0].predictions.task
    if task == "survival":
        return [drawn for one in evaluations for drawn in _kaplan_meier(one)]
    if task == "regression":
        return [_scatter(one) for one in evaluations]
    groups = [evaluations] if task == "binary" else [[one] for one in evaluations]
    drawn = [draw(group) for group in groups for draw in (_roc, _precision_recall)]
    return drawn + [draw(one) for one in evaluations for draw in (_confusion, _reliability)]


def _file_name(model: str, kind: str) -> str:
    """Return the file name of a figure: the letters and digits of the model's name, and the kind."""
    return "-".join(filter(None, (re.sub(r"[^\w.]+", "-", model).strip("-."), kind)))


def p_text(p: float) -> str:
    """Return the text of a p value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _axes(xlabel: str, ylabel: str, size: tuple[float, float] = _SIZE_INCH) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    figure.patch.set_facecolor("white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    for label, setter in ((xlabel, axes.set_xlabel), (ylabel, axes.set_ylabel)):
        setter(label, color=INK, fontsize=10)
    return figure, axes


def _square(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")


def _legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Add a legend below the axes, with fonts that have the names' characters, and without math markup."""
    columns = 1 if len(names) < 2 else 2 if len(names) < 5 or max(map(len, names)) > 8 else 3
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK
    )
    families = families_of("".join(names))
    for text in legend.get_texts():
        text.set_fontfamily(families)
        text.set_parse_math(False)


def _short(name: str) -> str:
    text = legible(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


Curves = list[tuple[str, Predictions, int, str]]


def _curves(group: Sequence[Evaluation], metric: str) -> Curves:
    """Return each curve's label, predictions, class, and value of the metric."""
    if group[0].predictions.task == "binary":
        return [
            (_short(one.name), one.predictions, 1, _value(one.metrics[metric].value)) for one in group[:_MOST_CURVES]
        ]
    one = group[0]
    present = present_classes(one.predictions)[:_MOST_CURVES]
    return [
        (
            _short(one.predictions.classes[index]),
            one.predictions,
            index,
            _value(one.by_class[index].metrics[metric].value),
        )
        for index in present
    ]


def _value(value: float | None) -> str:
    return "" if value is None else f" ({value:.3f})"


def _named(group: Sequence[Evaluation], kind: str) -> tuple[str, str]:
    """Return a figure's file name, and a phrase that says what it is of."""
    predictions = group[0].predictions
    if predictions.task == "binary":
        of = f"{predictions.target} is {predictions.classes[1]}"
        return (kind if len(group) > 1 else _file_name(group[0].name, kind)), of
    return _file_name(group[0].name, kind), f"{predictions.target}, each class against the rest; {group[0].name}"


def _draw_curves(
    group: Sequence[Evaluation],
    metric: str,
    points: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    figure: Figure,
    axes: Axes,
    **more: Any,
) -> None:
    curves = _curves(group, metric)
    for number, (name, predictions, index, value) in enumerate(curves):
        x, y = points(predictions.truth == index, predictions.scores_PK[:, index])
        colour, line = _COLOURS[number % len(_COLOURS)], _LINES[number % len(_LINES)]
        axes.plot(x, y, color=colour, linestyle=line, linewidth=1.8, label=f"{name}{value}", **more)
    _square(axes)
    _legend(figure, axes, [name for name, *_ in curves])


def _roc(group: Sequence[Evaluation]) -> Drawn:
    from sklearn.metrics import roc_curve

    figure, axes = _axes("1 − specificity", "Sensitivity")
    axes.plot([0, 1], [0, 1], color=_QUIET, linewidth=1, linestyle=(0, (2, 3)))
    _draw_curves(group, "auc", lambda truth, score: roc_curve(truth, score)[:2], figure, axes)
    name, of = _named(group, "roc")
    return Drawn(name, f"ROC: {of}. In brackets the AUC.", f"ROC curves of {of}", figure)


def _precision_recall(group: Sequence[Evaluation]) -> Drawn:
    from sklearn.metrics import precision_recall_curve

    def points(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        precision, recall, _ = precision_recall_curve(truth, score)
        return recall[::-1], precision[::-1]

    figure, axes = _axes("Recall", "Precision")
    if group[0].predictions.task == "binary":
        share = float((group[0].predictions.truth == 1).mean())
        axes.axhline(share, color=_QUIET, linewidth=1, linestyle=(0, (2, 3)))
    _draw_curves(group, "average_precision", points, figure, axes, drawstyle="steps-pre")
    name, of = _named(group, "precision-recall")
    return Drawn(
        name, f"Precision and recall: {of}. In brackets the average precision.", f"Precision-recall of {of}", figure
    )


def _confusion(one: Evaluation) -> Drawn:
    predictions = one.predictions
    classes = len(predictions.classes)
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (predictions.truth, predictions.predicted), 1)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(1.9 + 0.52 * classes, 3.6, 8))
    figure, axes = _axes(
        f"Predicted {legible(predictions.target)}", f"True {legible(predictions.target)}", (side, side)
    )
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [_short(name) for name in predictions.classes]
    families = families_of("".join((*names, legible(predictions.target))))
    long = max(map(len, names)) > 4
    tilt: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(range(classes), names, fontfamily=families, parse_math=False, **tilt)
    axes.set_yticks(range(classes), names, fontfamily=families, parse_math=False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_parse_math(False)
        label.set_fontfamily(families)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for row, column in np.ndindex(counts.shape) if classes <= _MOST_NUMBERED else ():
        text = f"{counts[row, column]:,}\n{share[row, column]:.0%}" if counts[row, column] else "0"
        ink = "#ffffff" if share[row, column] > 0.7 else "#1b1b1b"  # the cells have their own colours in both themes
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    counted = "Patients" if one.predictions.patient_of is None else "Slides or patches"
    title = f"Confusion: {one.name}. {counted}, and their share of the true class."
    return Drawn(_file_name(one.name, "confusion"), title, f"Confusion matrix of {one.name}", figure)


def _reliability(one: Evaluation) -> Drawn:
    two = len(one.predictions.classes) == 2
    found = reliability_of(one.predictions)
    of = f"of {_short(one.predictions.classes[1])}" if two else "of the likeliest class"
    figure, axes = _axes(f"Probability {of}", f"Share {'that is it' if two else 'that is right'}")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_parse_math(False)
        label.set_fontfamily(families_of(of))
    axes.plot([0, 1], [0, 1], color=_QUIET, linewidth=1, linestyle=(0, (2, 3)))
    error = np.clip(np.array([found.right - found.low, found.high - found.right]), 0, None)
    axes.errorbar(
        found.confidence, found.right, error, color=_COLOURS[0], marker="o", markersize=4, linewidth=1.4, capsize=2
    )
    for x, y, patients in zip(found.confidence, found.high, found.patients, strict=True):
        axes.annotate(
            f"{patients:,}", (x, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7, color=INK
        )
    _square(axes)
    axes.set_ylim(-0.02, 1.09)
    title = f"Reliability: {one.name}. Points on the dotted line are calibrated; numbers are patients."
    return Drawn(_file_name(one.name, "reliability"), title, f"Reliability of the probabilities of {one.name}", figure)


def _kaplan_meier(one: Evaluation) -> list[Drawn]:
    groups = risk_groups(one.predictions)
    if not groups:
        return []
    figure, axes = _axes("Time", "Share without the event", (_SIZE_INCH[0] * 1.15, _SIZE_INCH[1]))
    for number, group in enumerate(groups):
        colour = _COLOURS[number]
        axes.fill_between(group.times, group.low, group.high, step="post", color=colour, alpha=0.18, linewidth=0)
        label = f"{group.name}: {group.patients} patients, {group.events} events"
        axes.step(group.times, group.surviving, where="post", color=colour, linestyle=_LINES[number], label=label)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=0)
    _legend(figure, axes, [group.name for group in groups])
    _number_at_risk(axes, groups)
    p = log_rank(one.predictions)
    fold = "" if one.predictions.fold_P is None else " of the fold"
    title = f"Kaplan-Meier: {one.name}, parted at the median risk{fold}"
    title += "." if p is None else f"; log-rank p {p_text(p)}."
    return [Drawn(_file_name(one.name, "kaplan-meier"), title, f"Kaplan-Meier curves of {one.name}", figure)]


def _number_at_risk(axes: Axes, groups: Sequence[Any]) -> None:
    """Write the numbers of patients at risk below each tick, a line for each group."""
    last = axes.get_xlim()[1]
    ticks = [float(tick) for tick in axes.get_xticks() if 0 <= tick <= last]
    axes.set_xticks(
        ticks, ["\n".join([f"{tick:g}", *(str(group.at_risk(tick)) for group in groups)]) for tick in ticks]
    )
    for number, group in enumerate(groups):
        axes.annotate(
            group.name.split()[0], (0, 0), xytext=(-40, -24.5 - 10.6 * number), xycoords="axes fraction",
            textcoords="offset points", fontsize=8, color=_COLOURS[number],
        )  # fmt: skip
    axes.set_xlabel("Time; below it, patients at risk", color=INK, fontsize=10)


def _scatter(one: Evaluation) -> Drawn:
    predictions = one.predictions
    truth, value = predictions.truth, predictions.scores_PK[:, 0]
    target = legible(predictions.target)
    figure, axes = _axes(f"True {target}", f"Predicted {target}")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_parse_math(False)
        label.set_fontfamily(families_of(target))
    low, high = float(min(truth.min(), value.min())), float(max(truth.max(), value.max()))
    axes.plot([low, high], [low, high], color=_QUIET, linewidth=1, linestyle=(0, (2, 3)))
    axes.scatter(truth, value, s=14, color=_COLOURS[0], alpha=0.55, linewidths=0)
    axes.set_aspect("equal")
    title = f"Predicted and true {predictions.target}: {one.name}. On the dotted line they are equal."
    return Drawn(
        _file_name(one.name, "scatter"), title, f"Predicted against true {predictions.target} of {one.name}", figure
    )
