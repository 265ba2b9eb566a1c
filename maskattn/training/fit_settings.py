"""How any model is trained, whatever it reads: the settings of the loop and of the optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from maskattn.slide.asked import asked

__all__ = ["FitSettings"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """The loop and the optimiser: AdamW with clipped gradients.

    Attributes:
        epochs: how often all training cases are seen, at most.
        patience: epochs without a better validation after which training stops; 0 never stops early.
        monitor: what "better" means: a lower validation loss, or a higher metric of the task.
        lr: the highest learning rate.
        weight_decay: of matrices and vectors alike.
        schedule: "cosine" falls from ``lr`` to 0 over all epochs, "constant" stays; both warm up.
        warmup: the share of all steps in which the rate rises.
        clip: the greatest norm of the gradient.
        batch_size: cases for each pass; None is 8, of survival 32, of patches 32.
        accumulate: batches whose gradients make one step.
        precision: "32", or "bf16" and "16", which keep the weights in float32.
        class_weights: "balanced" weighs each class by how rare it is among the training cases.
        seed: of the weights, the order, the sampling and the dropout.
        device: "auto", "cpu", "cuda" or "cuda:N".
        devices: how many processes train together, on as many GPUs (or, on a CPU, with gloo).
        workers: processes that read ahead.
    """

    epochs: int = field(
        default=32, metadata=asked("--epochs", "How often all training cases are seen, at most.", minimum=1)
    )
    patience: int = field(
        default=12, metadata=asked("--patience", "Epochs without improvement before the stop; 0 = never.", minimum=0)
    )
    monitor: Literal["loss", "metric"] = field(
        default="loss", metadata=asked("--monitor", "What must improve on the validation cases: loss or metric.")
    )
    lr: float = field(default=1e-4, metadata=asked("--lr", "The highest learning rate.", minimum=0.0))
    weight_decay: float = field(default=0.01, metadata=asked("--weight-decay", "Of AdamW.", minimum=0.0))
    schedule: Literal["cosine", "constant"] = field(
        default="cosine", metadata=asked("--schedule", "Of the learning rate after its warm-up: cosine or constant.")
    )
    warmup: float = field(
        default=0.05, metadata=asked("--warmup", "Share of the steps in which the rate rises.", minimum=0.0, maximum=1)
    )
    clip: float = field(default=1.0, metadata=asked("--clip", "Greatest norm of the gradient.", minimum=0.0))
    batch_size: int | None = field(
        default=None,
        metadata=asked("--batch-size", "Cases at a time; by default 8, of survival and of patches 32.", minimum=1),
    )
    accumulate: int = field(
        default=1, metadata=asked("--accumulate", "Batches whose gradients make one step.", minimum=1)
    )
    precision: Literal["32", "bf16", "16"] = field(
        default="32", metadata=asked("--precision", "32, or mixed with bf16 or 16 (float16, on GPUs).")
    )
    class_weights: Literal["none", "balanced"] = field(
        default="none", metadata=asked("--class-weights", "none, or balanced: rare classes count more.")
    )
    seed: int = field(default=0, metadata=asked("--seed", "Of weights, order, sampling and dropout.", minimum=0))
    device: str = field(default="auto", metadata=asked("--device", "auto, cpu, cuda or cuda:N.", serves=None))
    devices: int = field(
        default=1, metadata=asked("--devices", "Processes that train together, each on a GPU of its own.", minimum=1)
    )
    workers: int = field(
        default=0, metadata=asked("--workers", "Processes that read ahead.", minimum=0, maximum=64, serves=None)
    )
