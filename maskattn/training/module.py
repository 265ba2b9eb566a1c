"""The Lightning module of all trainings: a loss for each batch, validation metrics, and the optimiser."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskattn.training.fit_settings import FitSettings
from maskattn.training.lightning import pl

__all__ = ["TrainedModule", "TrainingDivergedError", "rate_at"]


class TrainingDivergedError(ValueError):
    """The loss is not finite."""


class TrainedModule(pl.LightningModule):
    """The module that is trained.

    Args:
        settings: the settings of the loop and the optimiser.

    Attributes:
        found: the results of the last validation: "loss", and the metrics of the task.
        losses: the losses of this epoch's batches, in order.
        weight_of_batch: returns the factor of a batch's loss from the batch's index
            (:meth:`maskattn.training.batches.CaseBatches.weight`); 1 in one process.
        some_unused: whether a step may leave some parameters without a gradient, which DDP must know.
    """

    some_unused: bool = False

    def __init__(self, settings: FitSettings) -> None:
        super().__init__()
        self.settings = settings
        self.found: dict[str, float] = {}
        self.losses: list[Tensor] = []
        self.weight_of_batch: Callable[[int], float] = lambda batch: 1.0

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Compute the loss of a batch, with a graph."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups; by default all trainable parameters, with one learning rate."""
        return [{"params": [one for one in self.parameters() if one.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """Return AdamW, with the learning rate of :func:`rate_at` at every step."""
        settings = self.settings
        optimiser = torch.optim.AdamW(self.parameter_groups(), lr=settings.lr, weight_decay=settings.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate_at(settings, steps))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Clear the losses."""
        self.losses = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch's generator from the seed, the epoch, the step and the process."""
        words = (self.settings.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(_mixed(words))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            TrainingDivergedError: the loss is not finite.
        """
        loss = self.batch_loss(batch)
        if not bool(loss.isfinite()):
            raise TrainingDivergedError(
                f"the loss of a training must be finite, got {loss.item()} in epoch {self.current_epoch}, batch "
                f"{batch_idx}; take a lower --lr, or --precision 32"
            )
        loss = loss * self.weight_of_batch(batch_idx)
        self.losses.append(loss.detach())
        return loss

    def on_validation_epoch_end(self) -> None:
        """Log the results of the validation, which Lightning's early stopping reads."""
        self.found = self.judge()
        for name, value in self.found.items():
            self.log(f"validation_{name}", value, batch_size=1, rank_zero_only=False)

    def judge(self) -> dict[str, float]:
        """Return the results of this epoch's validation over all processes' cases: "loss" and metrics."""
        return {}

    def network(self) -> nn.Module:
        """Return the network whose weights are the result of the training."""
        raise NotImplementedError


def rate_at(settings: FitSettings, steps: int) -> Callable[[int], float]:
    """Return a function step → factor of the learning rate: a linear rise, then half a cosine to 0, or a constant."""
    rising = max(1, int(steps * settings.warmup + 1e-9))

    def factor(step: int) -> float:
        falling = 0.5 + 0.5 * math.cos(math.pi * step / steps) if settings.schedule == "cosine" else 1.0
        return min((step + 1) / rising, falling)

    return factor


def _mixed(words: tuple[int, ...]) -> int:
    """Mix several numbers into one seed (splitmix64); neighbouring numbers give unrelated seeds."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
