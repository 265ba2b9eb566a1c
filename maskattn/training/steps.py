"""Training for a number of steps on generated batches, in the same loop as every training."""

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
    """A network with a function that generates a batch and returns its loss."""

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
        """Return the loss of a step; the batch, its index, is not used."""
        loss = self._loss_of_step()
        if self._on_loss is not None:
            self._on_loss(loss.item())
        return loss

    def network(self) -> nn.Module:
        """Return the network."""
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
        network: the network; its parameters that require a gradient are trained.
        loss_of_step: generates a batch and returns its loss, with a graph.
        steps: number of steps, over which the learning rate rises and decays.
        settings: the settings of the loop and the optimiser, with one epoch.
        on_loss: called with the loss of each step.

    Raises:
        TrainingDivergedError: the loss is not finite.
    """
    fit(
        _Steps(settings, network, loss_of_step, on_loss),
        DataLoader(cast(Dataset[int], range(steps)), batch_size=None),
        None,
    )
