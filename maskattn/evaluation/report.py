"""The files of an evaluation: ``metrics.json``, figures, and ``report.html``, which needs no other file.

The page has the style of :mod:`maskattn.slide.report`, for light and dark themes, narrow and wide windows, and print.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import maskattn
from maskattn.errors import OutputError
from maskattn.evaluation.comparison import Difference
from maskattn.evaluation.figures import INK, Drawn, draw_figures, p_text
from maskattn.evaluation.intervals import Estimate
from maskattn.evaluation.metrics import metrics_of, metrics_of_class
from maskattn.evaluation.predictions import Predictions
from maskattn.evaluation.results import Evaluation, as_json
from maskattn.files import replacing
from maskattn.slide.names import as_text
from maskattn.slide.report.markup import Markup, element, joined
from maskattn.slide.report.page import page_head

__all__ = ["Comparison", "counted", "value_text", "write_evaluation"]

Comparison = tuple[str, str, list[Difference]]
_DPI = 200


def write_evaluation(
    out: Path, evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison] = (), *, title: str = ""
) -> Path:
    """Write ``metrics.json``, ``figures/`` and ``report.html``.

    Args:
        out: the folder; created if it does not exist.
        evaluations: the evaluations of models with one task.
        comparisons: (first model, second model, differences) of each comparison.
        title: title of the page.

    Returns:
        The path of the report.

    Raises:
        OutputError: a file cannot be written.
    """
    figures = draw_figures(evaluations)
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        drawings = [_saved(drawn, out / "figures") for drawn in figures]
        text = json.dumps(as_json(evaluations, comparisons), indent=2, ensure_ascii=False, allow_nan=False)
        _write(out / "metrics.json", f"{text}\n")
        page = joined([_head(evaluations, title), *_body(evaluations, comparisons, drawings), _END])
        _write(out / "report.html", page)
    except OSError as error:
        raise OutputError(
            f"an evaluation must be written completely, got {as_text(out)}: {error.strerror or error}; free space or "
            "choose another --out"
        ) from error
    return out / "report.html"


def value_text(found: Estimate) -> str:
    """Return the text of a value and its interval."""
    if found.value is None:
        return "–"
    interval = "" if found.low is None or found.high is None else f" ({_number(found.low)} to {_number(found.high)})"
    return f"{_number(found.value)}{interval}"


def counted(predictions: Predictions) -> str:
    """Return the text of the number of patients, and of rows if a patient may have several."""
    patients = f"{predictions.patients:,} patients"
    return patients if predictions.patient_of is None else f"{predictions.rows:,} slides or patches of {patients}"


def _number(value: float, signed: bool = False) -> str:
    """Return a number with three decimals, or one for values from 100 on."""
    decimals = 3 if abs(value) < 100 else 1
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _saved(drawn: Drawn, folder: Path) -> tuple[Drawn, Markup]:
    """Save a figure as PNG and SVG, and return it with its drawing for the page."""
    import matplotlib

    with replacing(folder / f"{drawn.name}.png") as temporary:
        drawn.figure.savefig(temporary, format="png", dpi=_DPI)
    path = folder / f"{drawn.name}.svg"
    # Text is kept as text; ids of elements are unique to this figure, and the same in every run.
    style = {"svg.fonttype": "none", "svg.hashsalt": drawn.name}
    with matplotlib.rc_context(style), replacing(path) as temporary:
        drawn.figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
    return drawn, _inline(path.read_text(encoding="utf-8"), drawn.alt)


def _inline(svg: str, alt: str) -> Markup:
    """Return a matplotlib drawing for embedding in the page, with the page's text colour and font."""
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    assert view is not None, "matplotlib gives each drawing its size"
    width, height = view.groups()
    opening = element("svg", viewBox=f"0 0 {width} {height}", role="img", aria_label=as_text(alt), class_="drawing")
    drawing = re.sub(r"<svg.*?>", lambda _: opening.removesuffix("</svg>"), drawing, count=1, flags=re.DOTALL)
    drawing = drawing.replace(INK, "var(--ink)")
    return Markup(re.sub(r"(font: [^;]*?px) [^;\"]*", r"\1 system-ui, sans-serif", drawing))


def _head(evaluations: Sequence[Evaluation], title: str) -> Markup:
    one = evaluations[0].predictions
    title = title or f"Evaluation: {one.target}"
    models = ", ".join(evaluation.name for evaluation in evaluations)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    patients = " and ".join(dict.fromkeys(counted(evaluation.predictions) for evaluation in evaluations))
    version = maskattn.__version__
    line = f"{models}. {one.task.capitalize()} task, {patients}. Written {now} by maskattn {version}."
    return Markup(page_head(title, line))


_END = Markup("</main></body></html>\n")


def _body(
    evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], drawings: Sequence[tuple[Drawn, Markup]]
) -> list[Markup]:
    figures = [element("figure", drawing, element("figcaption", drawn.title)) for drawn, drawing in drawings]
    parts = [
        element("section", element("h2", "Metrics"), _metric_table(evaluations), *_notes(evaluations)),
        *(_comparison(*comparison, evaluations[0].resamples) for comparison in comparisons),
        element("section", element("h2", "Figures"), element("div", *figures, class_="pictures drawings")),
    ]
    parts += [_model(one) for one in evaluations]
    return [*parts, _reading(evaluations[0])]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Return a table whose first column has names and whose others have numbers."""
    cells = (element("th", name, scope="col", class_="figure" if index else "text") for index, name in enumerate(heads))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", text, class_="figure") for text in row[1:]))
        for row in rows
    )
    table = element("table", element("thead", element("tr", *cells)), element("tbody", *body), class_="numbers")
    return element("div", table, class_="wide")


def _cell(found: Estimate, signed: bool = False) -> str:
    """Return a value with its interval below it."""
    if found.value is None or found.low is None or found.high is None:
        return "–" if found.value is None else _number(found.value, signed)
    interval = f"{_number(found.low, signed)} to {_number(found.high, signed)}"
    return joined([_number(found.value, signed), element("span", interval, class_="interval")])


def _metric_table(evaluations: Sequence[Evaluation]) -> Markup:
    rows = []
    for metric in metrics_of(evaluations[0].predictions.task):
        rows.append([metric.title, *(_cell(one.metrics[metric.name]) for one in evaluations)])
    return _table(["metric, 95 % interval", *(one.name for one in evaluations)], rows)


def _notes(evaluations: Sequence[Evaluation]) -> list[Markup]:
    lines = []
    for one in evaluations:
        prefix = f"{one.name}: " if len(evaluations) > 1 else ""
        lines += [f"{prefix}{note}" for note in one.notes]
        for name, found in one.metrics.items():
            if found.note:
                lines.append(
                    f"{prefix}{name} has no {'value' if found.value is None else 'interval'}: it is {found.note}."
                )
    return [element("ul", *(element("li", line) for line in dict.fromkeys(lines)))] if lines else []


def _comparison(first: str, second: str, differences: list[Difference], resamples: int) -> Markup:
    rows = []
    for one in differences:
        values = ["–" if value is None else _number(value) for value in (one.first, one.second)]
        rows.append([one.title, *values, _cell(one.difference, signed=True), "–" if one.p is None else p_text(one.p)])
    explanation = (
        "Over the patients that both predict, by a paired bootstrap; p is not corrected for the number of metrics."
    )
    return element(
        "section",
        element("h2", f"{second} less {first}"),
        _table(["metric", first, second, "difference, 95 % interval", "p"], rows),
        element("p", explanation, class_="check"),
    )


def _model(one: Evaluation) -> Markup:
    parts: list[Markup] = []
    if one.by_class:
        heads = ["class", "patients", *(metric.title for metric in metrics_of_class(0))]
        rows = [
            [result.name, f"{result.patients:,}", *(_cell(found) for found in result.metrics.values())]
            for result in one.by_class
        ]
        parts += [element("h3", "By class, each against the rest; 95 % intervals"), _table(heads, rows)]
    if one.by_fold:
        parts += [element("h3", "By fold"), _fold_table(one)]
    if one.temperature is not None:
        changes = "; ".join(
            f"{metric.title} {value_text(one.metrics[metric.name])} becomes {value_text(one.calibrated[metric.name])}"
            for metric in metrics_of(one.predictions.task)
            if metric.name in one.calibrated
        )
        line = f"The temperature fitted on the validation patients is {one.temperature:.3f}. With it, {changes}."
        parts += [element("h3", "Temperature"), element("p", line)]
    return element("section", element("h2", one.name), *parts) if parts else Markup("")


def _fold_table(one: Evaluation) -> Markup:
    import statistics

    metrics = metrics_of(one.predictions.task)
    rows: list[list[str]] = []
    for result in one.by_fold:
        values = [result.metrics[metric.name] for metric in metrics]
        shown = ["–" if value is None else _number(value) for value in values]
        rows.append([str(result.fold), f"{result.patients:,}", *shown])
    spread = []
    for metric in metrics:
        known = [value for result in one.by_fold if (value := result.metrics[metric.name]) is not None]
        enough = len(known) > 1
        deviation = element("span", f"± {_number(statistics.stdev(known))}", class_="interval") if enough else ""
        spread.append(joined([_number(statistics.mean(known)), deviation]) if enough else "–")
    rows.append(["mean ± sd", "", *spread])
    return _table(["fold", "patients", *(metric.title for metric in metrics)], rows)


def _reading(one: Evaluation) -> Markup:
    within = ", with equal numbers of each class or event in each resample" if one.stratified else ", without strata"
    lines: list[Any] = [
        f"Intervals have a level of 95 %, from {one.resamples:,} resamples of the patients (BCa; seed "
        f"{one.seed}{within}). They describe how the value may vary with other patients, not with another training."
    ]
    lines += [
        joined([element("strong", metric.title), f": {metric.meaning}"]) for metric in metrics_of(one.predictions.task)
    ]
    return element(
        "section", element("h2", "How to read this"), element("ul", *(element("li", line) for line in lines))
    )
