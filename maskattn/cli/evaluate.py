"""``maskattn evaluate``: computes metrics, figures and a report from predictions of patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from maskattn.cli.options import Debug
from maskattn.cli.reporting import errors_in_one_line, say

__all__ = ["evaluate"]


def evaluate(
    predictions: Annotated[
        list[Path],
        typer.Argument(
            help="Tables like STAMP's patient-preds.csv, or folders of folds; each is compared with the first.",
            metavar="PREDICTIONS.csv...",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html, metrics.json and figures.")],
    task: Annotated[
        Literal["binary", "multiclass", "ordinal", "regression", "survival"] | None,
        typer.Option("--task", help="The kind of prediction, if the columns do not determine it."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Column of the ground truth, if there are several.")
    ] = None,
    positive: Annotated[
        str | None, typer.Option("--positive", help="The positive one of two classes; by default the second.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option("--validation", help="The first model's predictions of other patients, to fit a temperature on."),
    ] = None,
    resamples: Annotated[int, typer.Option("--resamples", help="Bootstrap resamples of patients.", min=100)] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap.", min=0)] = 0,
    stratified: Annotated[
        bool, typer.Option("--stratified", help="Resample within each class, or with and without event.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Evaluate predictions of patients, with intervals and figures.

    Several models are compared by a paired bootstrap over the patients they share.
    """
    with errors_in_one_line(debug):
        from maskattn.evaluation.comparison import compare
        from maskattn.evaluation.inputs import model_names, read_model
        from maskattn.evaluation.metrics import metrics_of
        from maskattn.evaluation.report import counted, value_text, write_evaluation
        from maskattn.evaluation.results import evaluate_predictions, with_positive

        models = [read_model(path, task, target) for path in predictions]
        known = None if validation is None else read_model(validation, task, target)
        if positive is not None:
            models = [with_positive(one, positive) for one in models]
            known = None if known is None else with_positive(known, positive)
        names = model_names(predictions)
        comparisons = [
            (names[0], name, compare(models[0], one, resamples=resamples, seed=seed, stratified=stratified))
            for name, one in zip(names[1:], models[1:], strict=True)
        ]
        evaluations = [
            evaluate_predictions(
                one,
                name,
                validation=known if name == names[0] else None,
                resamples=resamples,
                seed=seed,
                stratified=stratified,
            )
            for name, one in zip(names, models, strict=True)
        ]
        report = write_evaluation(out, evaluations, comparisons)
    for one in evaluations:
        say(f"{one.name}: {one.predictions.task}, {counted(one.predictions)}")
        for metric in metrics_of(one.predictions.task):
            say(f"  {metric.title:<26} {value_text(one.metrics[metric.name])}")
        for note in one.notes:
            say(f"  note: {note}")
    for first, second, differences in comparisons:
        one_line = differences[0]
        p = "" if one_line.p is None else f", p {one_line.p:.3f}"
        say(f"{second} less {first}: {one_line.title} {value_text(one_line.difference)}{p}")
    say(f"report: {report}")
