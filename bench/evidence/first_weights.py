"""The first weights of the slide ViT: timm's, and what other slide models start from.

    python -m bench.evidence.first_weights

Cohorts are drawn as in :mod:`bench.evidence.independent_abmil`, none of them its cohort of the result. Our slide ViT
is trained in the independent loop there, with the clipped gradients and the temperature of `train`, and a batch of
packed slides per call. All starts share folds, orders and the seeds of their random numbers. Everything is seeded.

Dimension key: B slides, C channels, N tiles of the longest of them, P patients, M measures, U cross-validations.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.evidence.folds_auc import auc_within_folds
from bench.evidence.independent_abmil import FOLDS, Drawn, auc_of, settings_of
from bench.evidence.independent_loop import CHANNELS, predicted_plainly, trained_plainly
from maskattn.evaluation import Predictions
from maskattn.evaluation.calibration import fit_temperature, with_temperature
from maskattn.nn.slide_models.vit import ViTHead
from maskattn.training.models import build_head
from maskattn.training.settings import TrainSettings

COHORTS, SEEDS, RATE = (1, 11, 12, 13), (0, 1), 3e-4
TRAIN, TIMM, PYTORCH = "`train`'s", "timm's class token", "PyTorch's linear layers"
MEASURES = ("lowest validation loss", "mean AUC of the folds", "AUC", "AUC, folds aligned", "spread within classes")


def model_from(settings: TrainSettings, start: str) -> nn.Module:
    """Build the slide ViT with the first weights of a kind."""
    head = build_head(settings, CHANNELS, 2)
    if start == TIMM:
        nn.init.normal_(head.get_parameter("vit.cls_token"), std=1e-6)
    if start == PYTORCH:
        for module in head.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return head


def packed_logits(model: nn.Module, bags: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """Compute the logits of patients in one call, with their tiles as the pixels of images of one row."""
    tiles = [bags[name] for name in names]
    images_BCN = nn.utils.rnn.pad_sequence(tiles, batch_first=True).transpose(1, 2)
    keep_BN = torch.arange(images_BCN.shape[2]) < torch.tensor([len(one) for one in tiles])[:, None]
    return cast(Tensor, cast(ViTHead, model).vit(images_BCN[:, :, None], keep_BN))


def cross_validated(drawn: Drawn, seed: int, start: str) -> tuple[float, ...]:
    """Return the measures of a cross-validation."""
    settings = settings_of(drawn.folder, "vit", RATE, seed)
    label_of = {case.patient_id: int(case.truth[0]) for case in drawn.cohort.cases}
    losses, folds, aligned = [], [], []
    for fold, split in enumerate(drawn.folds(seed, FOLDS)):
        model, loss = trained_plainly(
            lambda: model_from(settings, start), drawn.bags, label_of, split, RATE, 100 * seed + fold, settings.clip,
            packed_logits,
        )  # fmt: skip
        validation, test = (
            predicted_plainly(model, drawn.bags, label_of, part, packed_logits)
            for part in (split.validation, split.test)
        )
        folds.append(with_temperature(test, fit_temperature(validation)).in_fold(fold))
        aligned.append(aligned_by(validation, test).in_fold(fold))
        losses.append(loss)
    joined = Predictions.joined(folds)
    spreads = [spread_within_classes(one) for one in folds]
    return (
        float(np.mean(losses)),
        auc_within_folds(joined),
        auc_of(joined),
        auc_of(Predictions.joined(aligned)),
        float(np.mean(spreads)),
    )


def aligned_by(validation: Predictions, test: Predictions) -> Predictions:
    """Return test predictions whose logits are 1 and −1 at the medians of the validation part's classes."""
    negative, positive = medians_of_classes(validation)
    logit_P = (2 * logits_of(test) - negative - positive) / (positive - negative)
    return replace(test, scores_PK=np.stack([1 / (1 + np.exp(logit_P)), 1 / (1 + np.exp(-logit_P))], axis=1))


def spread_within_classes(fold: Predictions) -> float:
    """Return the interquartile range of a class's logits, over the distance of the classes' medians."""
    ranges = [np.subtract(*np.quantile(logits_of(fold)[fold.truth == label], (0.75, 0.25))) for label in (0, 1)]
    negative, positive = medians_of_classes(fold)
    return float(np.mean(ranges) / (positive - negative))


def medians_of_classes(predictions: Predictions) -> list[float]:
    """Return the median logit of the negative and of the positive patients."""
    return [float(np.median(logits_of(predictions)[predictions.truth == label])) for label in (0, 1)]


def logits_of(predictions: Predictions) -> NDArray[np.float64]:
    """Return the logit of the positive class for each patient."""
    return np.log(predictions.scores_PK[:, 1]) - np.log(predictions.scores_PK[:, 0])


def main() -> None:
    """Run it and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)  # the bags are small
    found: dict[str, list[tuple[float, ...]]] = {start: [] for start in (TRAIN, TIMM, PYTORCH)}
    with tempfile.TemporaryDirectory() as folder:
        for cohort in COHORTS:
            drawn = Drawn.with_seed(Path(folder) / str(cohort), cohort)
            for seed in SEEDS:
                for start, values in found.items():
                    values.append(cross_validated(drawn, seed, start))
                    print(cohort, seed, start, *(f"{value:.3f}" for value in values[-1]), flush=True)
    print(table(found))


def table(found: dict[str, list[tuple[float, ...]]]) -> str:
    """Return the means, and the mean differences from `train`'s with their standard errors over cross-validations."""
    lines = [f"| first weights | {' | '.join(MEASURES)} |", f"|---|{'---|' * len(MEASURES)}"]
    for start, values in found.items():
        lines.append(f"| {start} | {' | '.join(f'{value:.3f}' for value in np.mean(values, axis=0))} |")
    for start in (TIMM, PYTORCH):
        apart_UM = np.array(found[start]) - np.array(found[TRAIN])
        error_M = apart_UM.std(axis=0, ddof=1) / len(apart_UM) ** 0.5
        cells = [f"{mean:+.3f} ± {error:.3f}" for mean, error in zip(apart_UM.mean(axis=0), error_M, strict=True)]
        lines.append(f"| {start} less {TRAIN} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("-", "−").replace("|−−−", "|---")


if __name__ == "__main__":
    main()
