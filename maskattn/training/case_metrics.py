"""Metrics of the validation cases after each epoch, by torchmetrics and scikit-survival.

:mod:`maskattn.evaluation` computes more metrics of a finished model, with intervals.

Dimension key: P cases, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskattn.training.cohort import Case
from maskattn.training.tasks import TrainedTask, ValueTask

__all__ = ["METRIC_OF", "case_metrics"]

METRIC_OF = {"binary": "auc", "multiclass": "auc", "ordinal": "kappa", "regression": "r2", "survival": "c_index"}
"""The metric of each task by which the best epoch may be chosen; higher is better for all of them."""


def case_metrics(name: str, outputs_PK: Tensor, cases: Sequence[Case], task: TrainedTask) -> dict[str, float]:
    """Compute the metrics of some cases; a metric that is undefined for them has its value at chance, 0 or 0.5.

    Args:
        name: the name of the task.
        outputs_PK: (P, K), the outputs.
        cases: the P cases, with their truth.
        task: the task as trained.
    """
    if name == "survival":
        return {"c_index": _concordance(outputs_PK[:, 0], cases)}
    if name == "regression":
        assert isinstance(task, ValueTask), "a regression has a ValueTask"
        return _of_values(outputs_PK[:, 0] * task.std + task.mean, torch.tensor([case.truth[0] for case in cases]))
    return _of_classes(name, outputs_PK.softmax(dim=1), torch.tensor([int(case.truth[0]) for case in cases]))


def _of_classes(name: str, scores_PK: Tensor, truth_P: Tensor) -> dict[str, float]:
    from torchmetrics.functional import classification as by

    K = scores_PK.shape[1]
    found = {"accuracy": float(by.multiclass_accuracy(scores_PK, truth_P, K, average="micro"))}
    if name == "ordinal":
        kappa = float(by.multiclass_cohen_kappa(scores_PK, truth_P, K, weights="quadratic"))
        found["kappa"] = kappa if kappa == kappa else 0.0  # all cases, and all predictions, are of one class
        return found
    # The mean over classes that some but not all cases have; with two classes, the second is enough.
    defined = [k for k in range(1 if K == 2 else 0, K) if 0 < int((truth_P == k).sum()) < len(truth_P)]
    areas = [float(by.binary_auroc(scores_PK[:, k], (truth_P == k).long())) for k in defined]
    found["auc"] = sum(areas) / len(areas) if areas else 0.5
    return found


def _of_values(predicted_P: Tensor, truth_P: Tensor) -> dict[str, float]:
    from torchmetrics.functional import regression as by

    error = float(by.mean_absolute_error(predicted_P.double(), truth_P.double()))
    differ = len(truth_P) > 1 and float(truth_P.std()) > 0
    return {"mae": error, "r2": float(by.r2_score(predicted_P.double(), truth_P.double())) if differ else 0.0}


def _concordance(risk_P: Tensor, cases: Sequence[Case]) -> float:
    from sksurv.exceptions import NoComparablePairException
    from sksurv.metrics import concordance_index_censored

    event_P = [case.truth[1] > 0 for case in cases]
    try:
        return float(concordance_index_censored(event_P, [case.truth[0] for case in cases], risk_P.double().numpy())[0])
    except (NoComparablePairException, ValueError):
        return 0.5
