"""Linear probes by patient: whoever is explained, or lies beside, has no image in the probe's training set.

Dimension key: B crops, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

__all__ = ["Probes", "leave_one_patient_out", "with_head"]


class Probes:
    """Probes of benign against malignant, one for each set of patients that it may not have seen.

    Args:
        features_BC: (B, C), class tokens of the training crops.
        malignant_B: (B,) bool.
        patients: of the crops.
        strength: inverse of the penalty, for features of unit variance.
    """

    def __init__(self, features_BC: Tensor, malignant_B: Tensor, patients: list[str], strength: float = 1.0) -> None:
        self.features, self.labels = features_BC.numpy().astype(np.float64), malignant_B.numpy()
        self.patients = np.array(patients)
        self.strength = strength
        self._fitted: dict[frozenset[str], tuple[Tensor, Tensor]] = {}

    def without(self, patients: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Weight (C,) and bias () of the malignant logit."""
        unseen = frozenset(patients)
        if unseen not in self._fitted:
            rows = ~np.isin(self.patients, list(unseen))
            x, y = self.features[rows], self.labels[rows]
            mean, std = x.mean(axis=0), x.std(axis=0)
            fit = LogisticRegression(C=self.strength, max_iter=2000).fit((x - mean) / std, y)
            weight = fit.coef_[0] / std
            bias = fit.intercept_[0] - weight @ mean
            self._fitted[unseen] = torch.from_numpy(weight).float(), torch.tensor(float(bias))
        return self._fitted[unseen]


def leave_one_patient_out(probes: Probes) -> tuple[float, float]:
    """Accuracy and area under the curve over the training crops, each judged without its patient."""
    from sklearn.metrics import roc_auc_score

    scores = np.zeros(len(probes.labels))
    for patient in set(probes.patients.tolist()):
        rows = probes.patients == patient
        weight, bias = probes.without([patient])
        scores[rows] = probes.features[rows] @ weight.double().numpy() + float(bias)
    return float(((scores > 0) == probes.labels).mean()), float(roc_auc_score(probes.labels, scores))


def with_head(head: nn.Linear, weight_C: Tensor, bias: Tensor) -> None:
    """Put a probe into a head of two outputs, benign and malignant, of opposite sign."""
    with torch.no_grad():
        head.weight.copy_(torch.stack([-weight_C, weight_C]) / 2)
        head.bias.copy_(torch.stack([-bias, bias]) / 2)
