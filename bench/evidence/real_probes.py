"""Linear probes by patient: no patient of an explained image has an image in the probe's training set.

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
    """Probes of malignant against benign, one for each set of patients left out of training.

    Args:
        features_BC: (B, C), class tokens of the training crops.
        malignant_B: (B,) bool.
        patients: the patient of each crop.
        strength: inverse of the L2 penalty, for features of unit variance.
    """

    def __init__(self, features_BC: Tensor, malignant_B: Tensor, patients: list[str], strength: float = 1.0) -> None:
        self.features, self.labels = features_BC.numpy().astype(np.float64), malignant_B.numpy()
        self.patients = np.array(patients)
        self.strength = strength
        self._fitted: dict[frozenset[str], tuple[Tensor, Tensor]] = {}

    def without(self, patients: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Fit without these patients, and return weight (C,) and bias () of the malignant logit."""
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
    """Compute accuracy and area under the ROC curve over the training crops, each judged without its patient."""
    from sklearn.metrics import roc_auc_score

    scores = np.zeros(len(probes.labels))
    for patient in set(probes.patients.tolist()):
        rows = probes.patients == patient
        weight, bias = probes.without([patient])
        scores[rows] = probes.features[rows] @ weight.double().numpy() + float(bias)
    return float(((scores > 0) == probes.labels).mean()), float(roc_auc_score(probes.labels, scores))


def with_head(head: nn.Linear, weight_C: Tensor, bias: Tensor) -> None:
    """Load a probe into a head with two outputs of opposite sign, benign and malignant."""
    with torch.no_grad():
        head.weight.copy_(torch.stack([-weight_C, weight_C]) / 2)
        head.bias.copy_(torch.stack([-bias, bias]) / 2)
