"""The training of a slide head on bags of tiles, a batch of cases at a time.

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
from maskattn.training.case_metrics import METRIC_OF, case_metrics
from maskattn.training.clustering import clustering_loss
from maskattn.training.cohort import Case, Cohort
from maskattn.training.module import TrainedModule
from maskattn.training.settings import TrainSettings
from maskattn.training.tasks import TrainedTask, ValueTask

__all__ = ["SlideTraining", "outputs_of_case", "predictions_of"]

# A batch of more tiles than this is run bag by bag again in the backward pass, so that memory is that of one bag.
_RECOMPUTE_ABOVE = 20_000


class SlideTraining(TrainedModule):
    """A slide head, its task, and the cases that judge it.

    Args:
        head: what is trained.
        task: of the cases.
        settings: of the training.
        cohort: whose task and classes they are.
        validation: the cases of the validation, in their dataset's order.

    Attributes:
        task: as given.
    """

    def __init__(
        self,
        head: SlideHead,
        task: TrainedTask,
        settings: TrainSettings,
        cohort: Cohort,
        validation: Sequence[Case] = (),
    ) -> None:
        super().__init__(settings)
        self.head = head
        self._settings, self.task, self._cohort, self._validation = settings, task, cohort, list(validation)
        self._clusters = isinstance(head, GatedAttentionHead) and hasattr(head, "instance_classifiers")
        self._outputs: dict[int, Tensor] = {}

    def transfer_batch_to_device(self, batch: list[CaseBags], device: torch.device, dataloader_idx: int) -> Any:
        """The cases on the model's device."""
        return [case.to(device) for case in batch]

    def batch_loss(self, batch: list[CaseBags]) -> Tensor:
        """The loss of some cases, all in one: of survival their risk sets, too."""
        again = len(batch) > 1 and sum(case.tiles for case in batch) > _RECOMPUTE_ABOVE
        outputs, instances = [], []
        for case in batch:
            if again:
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

    def on_validation_epoch_start(self) -> None:
        """Begin the outputs of this validation."""
        self._outputs = {}

    def validation_step(self, batch: list[CaseBags], batch_idx: int) -> None:
        """The outputs of some cases."""
        for case in batch:
            self._outputs[case.index] = outputs_of_case(self.head, self.task, case).float().cpu()

    def judge(self) -> dict[str, float]:
        """The loss of all validation cases in one, and the task's metrics."""
        outputs = _of_all_processes(self._outputs)
        outputs_PK = torch.stack([outputs[index] for index in range(len(self._validation))])
        loss = self.task.loss(outputs_PK, [case.truth for case in self._validation])
        return {"loss": float(loss), **case_metrics(self._cohort.task, outputs_PK, self._validation, self.task)}

    @property
    def metric(self) -> str:
        """Which of the task's metrics must rise, where the metric says which epoch is best."""
        return METRIC_OF[self._cohort.task]

    def network(self) -> SlideHead:
        """The head."""
        return self.head

    def _case(self, case: CaseBags) -> tuple[Tensor, Tensor]:
        """A case's output and the loss of its instances."""
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
    """The one output (K,) of a case."""

    def outputs_of(bag: Bag) -> Tensor:
        return cast(Tensor, head(bag.embeddings_TC, bag.coords_um_T2, bag.grid))

    return task.fuse(torch.stack([outputs_of(bag) for bag in case.bags]))


def predictions_of(
    outputs_PK: Tensor, cases: Sequence[Case], cohort: Cohort, task: TrainedTask, temperature: float = 1.0
) -> Predictions:
    """What outputs say of cases.

    Args:
        outputs_PK: a row for each case.
        cases: with what is true of them.
        cohort: whose task and classes they are.
        task: as it was trained.
        temperature: by which the logits of classes are divided.
    """
    names = tuple(case.case_id for case in cases)
    outputs_PK = outputs_PK.double()
    if isinstance(task, ValueTask):
        outputs_PK = outputs_PK * task.std + task.mean
    if cohort.classes:
        scores_PK = (outputs_PK / temperature).softmax(dim=1).numpy()
        truth_P: Any = [int(case.truth[0]) for case in cases]
        return Predictions(cohort.task, cohort.target, names, scores_PK, truth_P, cohort.classes)
    scores_PK = outputs_PK.numpy()
    if cohort.task == "survival":
        time_P: Any = [case.truth[0] for case in cases]
        event_P: Any = [case.truth[1] > 0 for case in cases]
        return Predictions(cohort.task, cohort.target, names, scores_PK, time_P=time_P, event_P=event_P)
    truth_P = [case.truth[0] for case in cases]
    return Predictions(cohort.task, cohort.target, names, scores_PK, truth_P)


def _of_all_processes(ours: dict[int, Tensor]) -> dict[int, Tensor]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ours
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, ours)
    return {index: output for part in every for index, output in part.items()}
