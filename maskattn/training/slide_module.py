"""The Lightning module that trains a slide head on bags of tiles, with a batch of cases per step.

Dimension key: B cases, S bags of a case, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskattn.evaluation.predictions import Predictions
from maskattn.nn.slide_models.gated_attention import GatedAttentionHead
from maskattn.nn.slide_models.head import SlideHead
from maskattn.training.bags import Bag, CaseBags
from maskattn.training.clustering import clustering_loss
from maskattn.training.cohort import Case, Cohort
from maskattn.training.judged_module import JudgedModule
from maskattn.training.settings import TrainSettings
from maskattn.training.tasks import TrainedTask, ValueTask

__all__ = ["SlideTraining", "outputs_of_case", "predictions_of"]

# A batch of more tiles than this is recomputed case by case in the backward pass, so that memory is that of one case.
_RECOMPUTE_ABOVE = 20_000


class SlideTraining(JudgedModule):
    """A slide head, its task, and its validation cases.

    Args:
        head: the head that is trained.
        task: the task.
        settings: the settings of the training.
        cohort: the cohort, for the task's name and classes.
        validation: the validation cases, in their dataset's order.
    """

    def __init__(
        self,
        head: SlideHead,
        task: TrainedTask,
        settings: TrainSettings,
        cohort: Cohort,
        validation: Sequence[Case] = (),
    ) -> None:
        super().__init__(settings, task, cohort, validation)
        self.head = head
        self._settings = settings
        self._clusters = isinstance(head, GatedAttentionHead) and hasattr(head, "instance_classifiers")
        self.some_unused = self._clusters  # each step reads the instance classifiers of its own classes

    def transfer_batch_to_device(self, batch: list[CaseBags], device: torch.device, dataloader_idx: int) -> Any:
        """Return the cases on the model's device."""
        return [case.to(device) for case in batch]

    def batch_loss(self, batch: list[CaseBags]) -> Tensor:
        """Return the loss over all cases of a batch; for survival, the risk sets are over the batch."""
        recompute = len(batch) > 1 and sum(case.tiles for case in batch) > _RECOMPUTE_ABOVE
        outputs, instances = [], []
        for case in batch:
            if recompute:
                output, instance = checkpoint(self._case, case, use_reentrant=False)
            else:
                output, instance = self._case(case)
            outputs.append(output)
            instances.append(instance)
        loss = self.task.loss(torch.stack(outputs), [case.truth for case in batch])
        if not self._clusters:
            return loss
        share = self._settings.instance_weight
        return (1 - share) * loss + share * torch.stack(instances).mean()

    def validation_step(self, batch: list[CaseBags], batch_idx: int) -> None:
        """Store the outputs of some cases."""
        for case in batch:
            self.validation_outputs[case.index] = outputs_of_case(self.head, self.task, case).float().cpu()

    def network(self) -> SlideHead:
        """Return the head."""
        return self.head

    def _case(self, case: CaseBags) -> tuple[Tensor, Tensor]:
        """Return a case's output and the loss of its instances."""
        if not self._clusters:
            return outputs_of_case(self.head, self.task, case), torch.zeros((), device=self.device)
        head = cast(GatedAttentionHead, self.head)
        outputs, losses = [], []
        for bag in case.bags:
            head.check(bag.embeddings_TC, bag.coords_um_T2, bag.grid)
            rows_TD, weights_AT = head.rows_and_weights(bag.embeddings_TC)
            outputs.append(head.classify(rows_TD, weights_AT))
            label = int(case.truth[0])
            losses.append(clustering_loss(head, rows_TD, weights_AT, label, self._settings.instances))
        return self.task.fuse(torch.stack(outputs)), torch.stack(losses).mean()


def outputs_of_case(head: SlideHead, task: TrainedTask, case: CaseBags) -> Tensor:
    """Return the output (K,) of a case, fused over its bags."""

    def outputs_of(bag: Bag) -> Tensor:
        return cast(Tensor, head(bag.embeddings_TC, bag.coords_um_T2, bag.grid))

    return task.fuse(torch.stack([outputs_of(bag) for bag in case.bags]))


def predictions_of(
    outputs_PK: Tensor, cases: Sequence[Case], cohort: Cohort, task: TrainedTask, temperature: float = 1.0
) -> Predictions:
    """Turn outputs into predictions.

    Args:
        outputs_PK: (P, K), a row for each case.
        cases: the P cases, with their truth.
        cohort: the cohort, for the task's name, target and classes.
        task: the task as trained.
        temperature: divisor of the logits of classes.
    """
    names = tuple(case.case_id for case in cases)
    by_slide = any(case.case_id != case.patient_id for case in cohort.cases)
    patients = tuple(case.patient_id for case in cases) if by_slide else None
    outputs_PK = outputs_PK.double()
    if isinstance(task, ValueTask):
        outputs_PK = outputs_PK * task.std + task.mean
    if cohort.classes:
        scores_PK = (outputs_PK / temperature).softmax(dim=1).numpy()
        truth_P: Any = [int(case.truth[0]) for case in cases]
        return Predictions(cohort.task, cohort.target, names, scores_PK, truth_P, cohort.classes, patient_of=patients)
    scores_PK = outputs_PK.numpy()
    if cohort.task == "survival":
        time_P: Any = [case.truth[0] for case in cases]
        event_P: Any = [case.truth[1] > 0 for case in cases]
        return Predictions(
            cohort.task, cohort.target, names, scores_PK, time_P=time_P, event_P=event_P, patient_of=patients
        )
    truth_P = [case.truth[0] for case in cases]
    return Predictions(cohort.task, cohort.target, names, scores_PK, truth_P, patient_of=patients)
