"""Tasks: their losses, and the fusion of the outputs for a patient's slides.

A head's outputs are logits of the classes (for ordinal classes log-probabilities, see
:mod:`maskattn.nn.slide_models.ordinal`), one standardised value, or one log risk.

Dimension key: B cases, S bags of a case, K outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.shapes import Bool, Float
from maskattn.training.cohort import Case

__all__ = ["ClassTask", "SurvivalTask", "TrainedTask", "ValueTask", "cox_loss", "task_of"]


class TrainedTask(ABC):
    """A kind of target that is predicted for a case.

    Attributes:
        num_classes: K, the number of outputs of a head for this task.
    """

    num_classes: int = 1

    @abstractmethod
    def loss(self, outputs_BK: Float[Tensor, "B K"], truths: Sequence[tuple[float, ...]]) -> Float[Tensor, ""]:
        """Compute the mean loss of some cases."""

    def fuse(self, outputs_SK: Float[Tensor, "S K"]) -> Float[Tensor, "K"]:
        """Fuse the outputs for a case's bags into one: their mean."""
        return outputs_SK.mean(dim=0)


class ClassTask(TrainedTask):
    """Classes, ordered or not: cross entropy.

    Args:
        num_classes: K.
        weights_K: the weight of a case of each class; their mean over the training cases is 1.
    """

    def __init__(self, num_classes: int, weights_K: Sequence[float] | None = None) -> None:
        self.num_classes = num_classes
        self.weights_K = None if weights_K is None else torch.tensor(weights_K, dtype=torch.float32)

    def loss(self, outputs_BK: Tensor, truths: Sequence[tuple[float, ...]]) -> Tensor:  # noqa: D102 (as above)
        truth_B = torch.tensor([int(truth[0]) for truth in truths], device=outputs_BK.device)
        losses_B = F.cross_entropy(outputs_BK.float(), truth_B, reduction="none")
        if self.weights_K is not None:
            # Divided by the number of cases, not by their weights, so that batches accumulate to one large batch.
            losses_B = losses_B * self.weights_K.to(truth_B.device)[truth_B]
        return losses_B.mean()

    def fuse(self, outputs_SK: Tensor) -> Tensor:
        """Fuse by the logarithm of the mean probabilities."""
        if len(outputs_SK) == 1:
            return outputs_SK[0]
        log_probabilities = outputs_SK.float().log_softmax(dim=1)
        return log_probabilities.logsumexp(dim=0) - float(np.log(len(outputs_SK)))


class ValueTask(TrainedTask):
    """A value: squared error of the standardised value.

    Args:
        mean: mean of the training cases' values.
        std: standard deviation of the training cases' values.
    """

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def loss(self, outputs_BK: Tensor, truths: Sequence[tuple[float, ...]]) -> Tensor:  # noqa: D102 (as above)
        values = [(truth[0] - self.mean) / self.std for truth in truths]
        return F.mse_loss(outputs_BK[:, 0].float(), torch.tensor(values, device=outputs_BK.device))


class SurvivalTask(TrainedTask):
    """A log risk: Cox's partial likelihood (:func:`cox_loss`)."""

    def loss(self, outputs_BK: Tensor, truths: Sequence[tuple[float, ...]]) -> Tensor:  # noqa: D102 (as above)
        time_B, event_B = torch.tensor(truths, dtype=torch.float64, device=outputs_BK.device).T
        return cox_loss(outputs_BK[:, 0].float(), time_B, event_B > 0)


def cox_loss(risk_B: Float[Tensor, "B"], time_B: Float[Tensor, "B"], event_B: Bool[Tensor, "B"]) -> Float[Tensor, ""]:
    """Compute the negative partial log-likelihood of proportional hazards (Cox, 1972) per event, with Breslow's ties.

        −1/|E| Σ_{i ∈ E} (r_i − log Σ_{j: t_j ≥ t_i} exp r_j)

    Args:
        risk_B: (B,) log risks.
        time_B: (B,) times to the event or to censoring.
        event_B: (B,) bool, whether the event was observed.

    Returns:
        The loss; 0, with gradient 0, if there are no events.
    """
    order = time_B.argsort(descending=True, stable=True)
    risk, time, event = risk_B[order], time_B[order], event_B[order]
    at_risk = risk.logcumsumexp(dim=0)
    # Patients with equal times are at risk together: each gets the sum up to the last of them.
    last = torch.searchsorted(-time, -time, right=True) - 1
    terms = (at_risk[last] - risk) * event
    return terms.sum() / event.sum().clamp(min=1)


def task_of(
    name: str, num_classes: int, training: Sequence[Case], class_weights: Literal["none", "balanced"] = "none"
) -> TrainedTask:
    """Return the task for training on some cases.

    Args:
        name: one of :data:`maskattn.evaluation.TASKS`.
        num_classes: K, for a task with classes.
        training: the training cases.
        class_weights: "balanced" gives a class with n_k of n cases the weight n / (K · n_k).

    Raises:
        ValueError: class weights are given for a task without classes, all values are equal, or there are fewer than
            two events.
    """
    if class_weights != "none" and name in ("regression", "survival"):
        raise ValueError(f"class weights need classes, got class_weights={class_weights!r} for a {name} task")
    first = np.array([case.truth[0] for case in training])
    if name == "regression":
        if not first.std() > 0:
            raise ValueError(f"values that are learnt must differ, got {first[0]:g} for all {len(first)} cases")
        return ValueTask(float(first.mean()), float(first.std()))
    if name == "survival":
        events = sum(case.truth[1] > 0 for case in training)
        if events < 2:
            raise ValueError(f"a survival task must have 2 events or more to learn from, got {events} in training")
        return SurvivalTask()
    if class_weights == "none":
        return ClassTask(num_classes)
    counts = np.bincount(first.astype(int), minlength=num_classes)
    return ClassTask(num_classes, [len(first) / (num_classes * max(1, int(count))) for count in counts])
