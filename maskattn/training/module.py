"""What Lightning trains: a loss for each batch, what validation finds, and an optimiser that all trainings share."""

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
    """The loss is no number any more."""


class TrainedModule(pl.LightningModule):
    """The module that is trained.

    Args:
        settings: of the loop and the optimiser.

    Attributes:
        found: what the last validation found: "loss", and the task's own metrics.
        losses: of the batches of this epoch, as they came.
        some_unused: whether a step may leave some parameters without a gradient, which processes that train together
            must know.
    """

    some_unused: bool = False

    def __init__(self, settings: FitSettings) -> None:
        super().__init__()
        self.settings = settings
        self.found: dict[str, float] = {}
        self.losses: list[Tensor] = []

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """The loss of a batch, with a graph."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser; by default all parameters that take a gradient, at one rate."""
        return [{"params": [one for one in self.parameters() if one.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """AdamW, with the rate of :func:`rate_at` at every step."""
        settings = self.settings
        optimiser = torch.optim.AdamW(self.parameter_groups(), lr=settings.lr, weight_decay=settings.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate_at(settings, steps))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's losses."""
        self.losses = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let what is random in this step depend on the seed, the epoch and the step alone."""
        words = (self.settings.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(_mixed(words))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch.

        Raises:
            TrainingDivergedError: it is no finite number.
        """
        loss = self.batch_loss(batch)
        if not bool(loss.isfinite()):
            raise TrainingDivergedError(
                f"the loss of a training must be finite, got {loss.item()} in epoch {self.current_epoch}, batch "
                f"{batch_idx}; take a lower --lr, or --precision 32"
            )
        self.losses.append(loss.detach())
        return loss

    def on_validation_epoch_end(self) -> None:
        """Hand what validation found to Lightning, whose early stopping reads it."""
        self.found = self.judge()
        for name, value in self.found.items():
            self.log(f"validation_{name}", value, batch_size=1, rank_zero_only=False)

    def judge(self) -> dict[str, float]:
        """What the validation of this epoch found, of all processes' cases: "loss" and metrics."""
        return {}

    def network(self) -> nn.Module:
        """What the training is for; its weights are kept."""
        raise NotImplementedError


def rate_at(settings: FitSettings, steps: int) -> Callable[[int], float]:
    """Step → factor of the learning rate: a linear rise, then half a cosine down to 0, or a constant."""
    rising = max(1, int(steps * settings.warmup + 1e-9))

    def factor(step: int) -> float:
        falling = 0.5 + 0.5 * math.cos(math.pi * step / steps) if settings.schedule == "cosine" else 1.0
        return min((step + 1) / rising, falling)

    return factor


def _mixed(words: tuple[int, ...]) -> int:
    """One seed from several numbers, of which neighbours give seeds that are far apart (splitmix64)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
