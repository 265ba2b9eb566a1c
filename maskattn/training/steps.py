"""Training by steps whose batches are drawn and not read: the same loop, for what makes its own data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from maskattn.training.fit_settings import FitSettings
from maskattn.training.loop import fit
from maskattn.training.module import TrainedModule

__all__ = ["fit_steps"]


class _Steps(TrainedModule):
    """A network whose loss is drawn anew at each step."""

    def __init__(
        self,
        settings: FitSettings,
        network: nn.Module,
        loss_of_step: Callable[[], Tensor],
        on_loss: Callable[[float], None] | None,
    ) -> None:
        super().__init__(settings)
        self.trained = network
        self._loss_of_step, self._on_loss = loss_of_step, on_loss

    def batch_loss(self, batch: Any) -> Tensor:
        """The loss of a step; which step it is, the data do not ask."""
        loss = self._loss_of_step()
        if self._on_loss is not None:
            self._on_loss(loss.item())
        return loss

    def network(self) -> nn.Module:
        """The network that is trained."""
        return self.trained


def fit_steps(
    network: nn.Module,
    loss_of_step: Callable[[], Tensor],
    steps: int,
    settings: FitSettings,
    on_loss: Callable[[float], None] | None = None,
) -> None:
    """Train a network, in place, for a number of steps.

    Args:
        network: its parameters that take a gradient are trained.
        loss_of_step: draws a batch and gives its loss, with a graph.
        steps: how many; warm-up and fall of the learning rate are laid over them.
        settings: of the loop and the optimiser; of one epoch.
        on_loss: called with the loss of each step.

    Raises:
        TrainingDivergedError: the loss is no number any more.
    """
    fit(
        _Steps(settings, network, loss_of_step, on_loss),
        DataLoader(cast(Dataset[int], range(steps)), batch_size=None),
        None,
    )
