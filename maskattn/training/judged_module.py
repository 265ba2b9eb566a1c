"""A training whose validation cases have one output each, from which its epochs are compared.

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
        settings: the settings of the loop and the optimiser.
        task: the task.
        cohort: the cohort, for the task's name and classes.
        validation: the validation cases, in their dataset's order.

    Attributes:
        task, cohort, validation: the arguments.
        validation_outputs: index of a validation case → its output, filled by ``validation_step``.
    """

    def __init__(self, settings: FitSettings, task: TrainedTask, cohort: Cohort, validation: Sequence[Case]) -> None:
        super().__init__(settings)
        self.task, self.cohort, self.validation = task, cohort, list(validation)
        self.validation_outputs: dict[int, Tensor] = {}

    def on_validation_epoch_start(self) -> None:
        """Clear the outputs."""
        self.validation_outputs = {}

    def judge(self) -> dict[str, float]:
        """Return the loss over all validation cases, and the task's metrics."""
        outputs_PK = self.all_outputs()
        loss = self.task.loss(outputs_PK, [case.truth for case in self.validation])
        return {"loss": float(loss), **case_metrics(self.cohort.task, outputs_PK, self.validation, self.task)}

    def all_outputs(self) -> Tensor:
        """Return the (P, K) outputs of the last validation, from all processes."""
        outputs = _of_all_processes(self.validation_outputs)
        return torch.stack([outputs[index] for index in range(len(self.validation))])

    @property
    def metric(self) -> str:
        """The name of the metric that is highest in the best epoch, with ``monitor="metric"``."""
        return METRIC_OF[self.cohort.task]


def added(own: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the sums of all processes' tensors, by index."""
    total: dict[int, Tensor] = {}
    for tensors in _every_process(own):
        for index, one in tensors.items():
            total[index] = total[index] + one if index in total else one
    return total


def _of_all_processes(own: dict[int, Tensor]) -> dict[int, Tensor]:
    return {index: output for outputs in _every_process(own) for index, output in outputs.items()}


def _every_process(own: dict[int, Tensor]) -> list[dict[int, Tensor]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return every
