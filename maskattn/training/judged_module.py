"""A training whose validation cases have one output each, by which its epochs are compared.

Dimension key: P cases, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskattn.training.case_metrics import METRIC_OF, case_metrics
from maskattn.training.cohort import Case, Cohort
from maskattn.training.fit_settings import FitSettings
from maskattn.training.module import TrainedModule
from maskattn.training.tasks import TrainedTask

__all__ = ["JudgedModule", "added"]


class JudgedModule(TrainedModule):
    """A module that is trained, with its validation cases.

    Args:
        settings: of the loop and the optimiser.
        task: of the cases.
        cohort: whose task and classes they are.
        validation: the cases of the validation, in their dataset's order.

    Attributes:
        task, cohort, validation: as given.
        validation_outputs: index of a validation case → its output, as ``validation_step`` finds them.
    """

    def __init__(self, settings: FitSettings, task: TrainedTask, cohort: Cohort, validation: Sequence[Case]) -> None:
        super().__init__(settings)
        self.task, self.cohort, self.validation = task, cohort, list(validation)
        self.validation_outputs: dict[int, Tensor] = {}

    def on_validation_epoch_start(self) -> None:
        """Begin the outputs of this validation."""
        self.validation_outputs = {}

    def judge(self) -> dict[str, float]:
        """The loss of all validation cases in one, and the task's metrics."""
        outputs_PK = self.all_outputs()
        loss = self.task.loss(outputs_PK, [case.truth for case in self.validation])
        return {"loss": float(loss), **case_metrics(self.cohort.task, outputs_PK, self.validation, self.task)}

    def all_outputs(self) -> Tensor:
        """(P, K) outputs of the last validation, of all processes."""
        outputs = _of_all_processes(self.validation_outputs)
        return torch.stack([outputs[index] for index in range(len(self.validation))])

    @property
    def metric(self) -> str:
        """Which of the task's metrics must rise, where the metric says which epoch is best."""
        return METRIC_OF[self.cohort.task]


def added(ours: dict[int, Tensor]) -> dict[int, Tensor]:
    """Sums by index, those of all processes added."""
    total: dict[int, Tensor] = {}
    for part in _every_process(ours):
        for index, one in part.items():
            total[index] = total[index] + one if index in total else one
    return total


def _of_all_processes(ours: dict[int, Tensor]) -> dict[int, Tensor]:
    return {index: output for part in _every_process(ours) for index, output in part.items()}


def _every_process(ours: dict[int, Tensor]) -> list[dict[int, Tensor]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [ours]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, ours)
    return every
