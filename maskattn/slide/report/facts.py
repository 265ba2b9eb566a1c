"""The report's text and tables: scores, verdicts, skipped areas, settings, versions and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from maskattn.slide.finished import FinishedRun, FinishedSlide
from maskattn.slide.prediction import SlidePrediction
from maskattn.slide.report.markup import Markup, element, joined

__all__ = ["facts_of", "map_sentence", "model_cards", "notes_of", "pairs", "run_table", "score_table"]

_VERDICTS = {
    "passed": "passed: the score from only the tiles that it ranks as most relevant is higher than from those that it "
    "ranks as least relevant, by more than at random",
    "weak": "weak: the map cannot be distinguished from noise",
    "contradicts": "contradicts: the score from only the tiles that it ranks as most relevant is lower than from those "
    "that it ranks as least relevant, by more than at random; do not take this map as evidence",
    "skipped": "skipped: there are too few tiles to test it",
    "not asked for": "not asked for",
}

_FIGURES = frozenset(("score", "logit", "sum over tiles", "tiles", "tokens kept", "seconds"))


def map_sentence(prediction: SlidePrediction, name: str) -> str:
    """Return sentences on the method and the map check of a class's map."""
    about = prediction.maps.get(name, {})
    verdict = str(about.get("map_check", "not recorded"))
    z = f" (z = {about['z']:.1f})" if verdict in ("passed", "weak", "contradicts") and "z" in about else ""
    drawn = f"Drawn by {about['method']}. " if "method" in about else ""
    return f"{drawn}Map check {_VERDICTS.get(verdict, verdict)}{z}."


def score_table(prediction: SlidePrediction) -> Markup:
    """Return a table of the classes with score, logit, verdict of the map check and sum over the map's tiles."""
    ranked = sorted(prediction.scores, key=prediction.scores.__getitem__, reverse=True)
    rows = []
    for name in ranked:
        about = prediction.maps.get(name, {})
        verdict = str(about.get("map_check", ""))
        rows.append(
            element(
                "tr",
                element("th", name, scope="row"),
                _figure(f"{prediction.scores[name]:.4f}"),
                _figure(f"{prediction.logits.get(name, float('nan')):+.3f}"),
                element("td", verdict, class_=f"verdict {verdict}" if verdict in _VERDICTS else "verdict"),
                _figure(f"{about['sum_of_tiles']:+.3f}" if "sum_of_tiles" in about else ""),
            )
        )
    heads = ("class", "score", "logit", "map check", "sum over tiles")
    return _table(heads, rows)


def run_table(run: FinishedRun, anchors: Mapping[str, str]) -> Markup:
    """Return a table with a row for every slide, linked to its section.

    Args:
        run: the finished run.
        anchors: the HTML id of each slide's section, by slide id.
    """
    rows = []
    for slide in run.slides:
        prediction = slide.prediction
        link = element("th", element("a", slide.slide_id, href=f"#{anchors[slide.slide_id]}"), scope="row")
        cells = [element("td", slide.status, class_=f"status {slide.status}" if slide.status.isalpha() else "status")]
        if prediction is None:
            rows.append(element("tr", link, *cells, element("td", slide.reason, colspan=6, class_="reason")))
            continue
        counts = prediction.counts
        share = counts.kept_tokens / max(counts.kept_tokens + counts.skipped_tokens, 1)
        verdict = str(prediction.maps.get(prediction.prediction, {}).get("map_check", ""))
        cells += [
            element("td", prediction.prediction),
            _figure(f"{prediction.scores[prediction.prediction]:.3f}"),
            element("td", verdict, class_=f"verdict {verdict}" if verdict in _VERDICTS else "verdict"),
            _figure(f"{counts.kept_tiles:,}"),
            _figure(f"{share:.1%}"),
            _figure(slide.seconds),
        ]
        rows.append(element("tr", link, *cells))
    return _table(("slide", "status", "prediction", "score", "map check", "tiles", "tokens kept", "seconds"), rows)


def notes_of(slide: FinishedSlide) -> Markup:
    """Return a list of what was skipped and why, with the run's other notes on the slide."""
    prediction = slide.prediction
    assert prediction is not None
    counts = prediction.counts
    tokens = counts.kept_tokens + counts.skipped_tokens
    lines = [
        f"{counts.kept_tiles:,} of {counts.cells:,} tiles contain tissue, and {counts.kept_tokens:,} of {tokens:,} "
        f"tokens; the other {counts.skipped_tokens:,} tokens are glass according to "
        f"'{prediction.tissue.get('method', 'a method that is not recorded')}' and were left out.",
    ]
    if counts.unreadable_tiles:
        lines.append(f"{counts.unreadable_tiles:,} tiles could not be read and were left out.")
    lines += [f"{note}." for note in (*prediction.tissue.get("notes", ()), *prediction.notes)]
    if slide.status == "failed":
        lines.append(f"The last run failed ({slide.reason}); these are the results of an earlier one.")
    return joined([element("h3", "What was skipped"), element("ul", *(element("li", line) for line in lines))])


def facts_of(prediction: SlidePrediction) -> Markup:
    """Return the slide's file, settings, timings and versions, in a collapsed section."""
    slide = {name: value for name, value in vars(prediction.slide).items() if value not in (None, "")}
    versions: dict[str, Any] = prediction.versions
    groups = {
        "Slide": slide,
        "Settings": prediction.settings,
        "Seconds by stage": prediction.timings_s,
        "Versions": versions,
    }
    boxes = [element("div", element("h4", title), pairs(facts), class_="facts") for title, facts in groups.items()]
    return element(
        "details", element("summary", "File, settings, timings, versions"), element("div", *boxes, class_="groups")
    )


def model_cards(run: FinishedRun) -> Markup:
    """Return a card for every model that predicted slides of the run."""
    by_model: dict[str, list[SlidePrediction]] = {}
    for slide in run.slides:
        if slide.prediction is not None:
            by_model.setdefault(slide.prediction.model.sha256, []).append(slide.prediction)
    cards = []
    for predictions in by_model.values():
        model, settings = predictions[0].model, predictions[0].settings
        facts = {
            "classes": ", ".join(model.classes),
            "SHA-256 of weights and configuration begins": model.sha256,
            "tiles": f"{settings.get('tile_px', '?')} px at {settings.get('spacing_um', '?')} µm per pixel",
            "tokens": f"{settings.get('token_px', '?')} px",
            "background": "left out" if settings.get("masked", True) else "attended to",
            "slides here": len(predictions),
            "demonstration": "yes: its classes are meaningless on real tissue" if model.demonstration else "no",
        }
        note = [element("p", model.note)] if model.note else []
        cards.append(element("div", element("h3", model.name), *note, pairs(facts), class_="card"))
    return joined(cards or [element("p", "No slide has a prediction.")])


def pairs(facts: Mapping[str, Any]) -> Markup:
    """Return a definition list of names and values."""
    terms = (
        joined([element("dt", name.replace("_", " ")), element("dd", _said(value))]) for name, value in facts.items()
    )
    return element("dl", *terms)


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _figure(text: str) -> Markup:
    return element("td", text.replace("-", "−"), class_="figure")


def _table(heads: Iterable[str], rows: Iterable[Markup]) -> Markup:
    cells = (element("th", name, scope="col", class_="figure" if name in _FIGURES else "text") for name in heads)
    head = element("thead", element("tr", *cells))
    return element("div", element("table", head, element("tbody", *rows)), class_="wide")
