"""The settings of the training loop and of the optimiser, which all trainings share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from maskattn.slide.asked import asked

__all__ = ["FitSettings"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """The loop and the optimiser: AdamW with clipped gradients.

    Attributes:
        epochs: largest number of passes over the training cases.
        patience: epochs without improvement after which training stops; 0 never stops early.
        monitor: "loss" looks for the lowest validation loss, "metric" for the highest metric of the task.
        lr: the peak learning rate.
        weight_decay: AdamW's weight decay, for matrices and vectors alike.
        schedule: "cosine" decays from ``lr`` to 0 over all epochs, "constant" does not; both warm up.
        warmup: the share of all steps in which the learning rate rises.
        clip: the largest norm of the gradient.
        batch_size: cases of a batch; None is 8, or 32 for survival, patches and tiles.
        accumulate: number of batches whose gradients make one step.
        precision: "32", or mixed precision "bf16" or "16", with weights in float32.
        class_weights: "balanced" weights each class inversely to its frequency among the training cases.
        seed: seed of the weights, the order, the sampling and the dropout.
        device: "auto", "cpu", "cuda" or "cuda:N".
        devices: number of processes that train together, on as many GPUs (or, on a CPU, with gloo).
        workers: number of processes that read ahead.
    """

    epochs: int = field(
        default=32, metadata=asked("--epochs", "Largest number of passes over the training cases.", minimum=1)
    )
    patience: int = field(
        default=12, metadata=asked("--patience", "Epochs without improvement before stopping; 0 = never.", minimum=0)
    )
    monitor: Literal["loss", "metric"] = field(
        default="loss", metadata=asked("--monitor", "What must improve on the validation cases: loss or metric.")
    )
    lr: float = field(default=1e-4, metadata=asked("--lr", "Peak learning rate.", minimum=0.0))
    weight_decay: float = field(default=0.01, metadata=asked("--weight-decay", "AdamW's weight decay.", minimum=0.0))
    schedule: Literal["cosine", "constant"] = field(
        default="cosine", metadata=asked("--schedule", "Learning rate after warm-up: cosine or constant.")
    )
    warmup: float = field(
        default=0.05,
        metadata=asked("--warmup", "Share of the steps in which the learning rate rises.", minimum=0.0, maximum=1),
    )
    clip: float = field(default=1.0, metadata=asked("--clip", "Largest norm of the gradient.", minimum=0.0))
    batch_size: int | None = field(
        default=None,
        metadata=asked(
            "--batch-size", "Cases of a batch; by default 8, or 32 for survival, patches and tiles.", minimum=1
        ),
    )
    accumulate: int = field(
        default=1, metadata=asked("--accumulate", "Batches whose gradients make one step.", minimum=1)
    )
    precision: Literal["32", "bf16", "16"] = field(
        default="32", metadata=asked("--precision", "32, or mixed precision: bf16, or 16 (float16, on GPUs).")
    )
    class_weights: Literal["none", "balanced"] = field(
        default="none", metadata=asked("--class-weights", "none, or balanced, which weights rare classes more.")
    )
    seed: int = field(default=0, metadata=asked("--seed", "Seed of weights, order, sampling and dropout.", minimum=0))
    device: str = field(default="auto", metadata=asked("--device", "auto, cpu, cuda or cuda:N.", serves=None))
    devices: int = field(
        default=1, metadata=asked("--devices", "Processes that train together, each on its own GPU.", minimum=1)
    )
    workers: int = field(
        default=0, metadata=asked("--workers", "Processes that read ahead.", minimum=0, maximum=64, serves=None)
    )
