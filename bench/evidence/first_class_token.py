"""The first class token of the slide ViT: timm's, near 0, compared with a standard normal one, which `train` takes.

    python -m bench.evidence.first_class_token

Cohorts are drawn as in :mod:`bench.evidence.independent_abmil`, none of them its cohort of the result. Our slide ViT
is trained in the independent loop there, with the clipped gradients of `train`. Both starts share all other first
weights, folds and orders. Everything is seeded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.evidence.folds_auc import auc_within_folds
from bench.evidence.independent_abmil import (
    CHANNELS,
    FOLDS,
    Drawn,
    auc_of,
    logits_of,
    settings_of,
    trained_plainly,
)
from maskattn.evaluation import Predictions
from maskattn.training.models import build_head
from maskattn.training.settings import TrainSettings

COHORTS, SEEDS, RATE = (1, 11, 12, 13), (0, 1), 1e-3
STARTS = {"normal, 1e-6 (timm's)": 1e-6, "normal, 1 (`train`'s)": None}
MEASURES = ("lowest validation loss", "mean AUC of the folds", "AUC")


def model_with(settings: TrainSettings, deviation: float | None) -> Callable[[], nn.Module]:
    """Return a function that builds the slide ViT; None leaves its class token as `train` draws it."""

    def make() -> nn.Module:
        head = build_head(settings, CHANNELS, 2)
        if deviation is not None:
            with torch.no_grad():
                head.get_parameter("vit.cls_token").mul_(deviation)
        return head

    return make


def cross_validated(drawn: Drawn, seed: int, deviation: float | None) -> tuple[float, ...]:
    """Return the measures of a cross-validation."""
    settings = settings_of(drawn.folder, "vit", RATE, seed)
    label_of = {case.patient_id: int(case.truth[0]) for case in drawn.cohort.cases}
    losses, folds = [], []
    for fold, split in enumerate(drawn.folds(seed, FOLDS)):
        make = model_with(settings, deviation)
        model, loss = trained_plainly(make, drawn.bags, label_of, split, RATE, 100 * seed + fold, settings.clip)
        scores = torch.softmax(logits_of(model, drawn.bags, split.test).double(), dim=1).numpy()
        truth = [label_of[name] for name in split.test]
        folds.append(Predictions("binary", "tumour", split.test, scores, truth, ("0", "1")).in_fold(fold))
        losses.append(loss)
    predictions = Predictions.joined(folds)
    return float(np.mean(losses)), auc_within_folds(predictions), auc_of(predictions)


def main() -> None:
    """Run it and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)  # the bags are small
    found: dict[str, list[tuple[float, ...]]] = {start: [] for start in STARTS}
    with tempfile.TemporaryDirectory() as folder:
        for cohort in COHORTS:
            drawn = Drawn.with_seed(Path(folder) / str(cohort), cohort)
            for seed in SEEDS:
                for start, deviation in STARTS.items():
                    found[start].append(cross_validated(drawn, seed, deviation))
                    print(cohort, seed, start, *(f"{value:.3f}" for value in found[start][-1]), flush=True)
    print(table(found))


def table(found: dict[str, list[tuple[float, ...]]]) -> str:
    """Return the means, and the mean differences with their standard errors over the cross-validations."""
    before_UM, after_UM = (np.array(values) for values in found.values())
    lines = [f"| first class token | {' | '.join(MEASURES)} |", f"|---|{'---|' * len(MEASURES)}"]
    for start, values in found.items():
        lines.append(f"| {start} | {' | '.join(f'{value:.3f}' for value in np.mean(values, axis=0))} |")
    apart_UM = after_UM - before_UM
    error_M = apart_UM.std(axis=0, ddof=1) / len(apart_UM) ** 0.5
    cells = [f"{mean:+.3f} ± {error:.3f}" for mean, error in zip(apart_UM.mean(axis=0), error_M, strict=True)]
    lines.append(f"| difference ± standard error | {' | '.join(cells)} |".replace("-0", "−0"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
