"""How the bundled model was trained: ``python -m maskattn.demo.train``.

Stage 1 trains the tile encoder to tell what a tile is made of (glass, benign, low, high: shares of its kept tokens).
Stage 2 draws other slides, encodes them once, and trains the slide encoder on slide labels alone. Every slide is
drawn on the fly from its seed; seeds below :data:`FIRST_TRAINING_SEED` are never trained on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskattn.demo.samples import KINDS, TILE_PX, TOKEN_PX, sample_slide
from maskattn.demo.synthetic import CLASSES, SPACING_UM
from maskattn.nn.slide_model import SlideModel, SlideModelConfig

__all__ = ["BUNDLED_WEIGHTS", "FIRST_TRAINING_SEED", "Losses", "TrainingPlan", "main", "model_config", "train"]

BUNDLED_WEIGHTS = Path(__file__).with_name("model.safetensors")
FIRST_TRAINING_SEED = 1_000_000
EMBED_DIM = 96
GRID = 16
NOTE = (
    "Demonstration model, trained on synthetic slides by python -m maskattn.demo.train. Its classes mean nothing on "
    "real tissue."
)


@dataclass(frozen=True)
class TrainingPlan:
    """How much is drawn and how long each stage runs; the defaults made the bundled weights.

    Attributes:
        masked: False trains the unmasked twin, which sees all tiles and tokens.
        seed: seed of the slides, the initial weights and the order of batches.
        tile_slides: slides drawn for stage 1.
        tiles_per_slide: tiles taken from each of them.
        tile_steps: optimiser steps of stage 1, of ``tile_batch`` tiles.
        label_slides: slides drawn for stage 2.
        label_steps: optimiser steps of stage 2, of ``label_batch`` slides.
    """

    masked: bool = True
    seed: int = 0
    tile_slides: int = 200
    tiles_per_slide: int = 64
    tile_steps: int = 1000
    tile_batch: int = 64
    label_slides: int = 400
    label_steps: int = 500
    label_batch: int = 32

    @property
    def first_slide_seed(self) -> int:
        """Seed of the first training slide."""
        return FIRST_TRAINING_SEED * (1 + self.seed)


@dataclass
class Losses:
    """Training losses in order of steps."""

    tiles: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TileSet:
    """Tiles of many slides for stage 1: (M, 3, P, P) uint8, (M, h, w) bool, (M, 4) shares of each kind."""

    tiles: Tensor
    keep: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class EncodedSlides:
    """Slides for stage 2: (S, C, H, W) tile embeddings at their places, (S, H, W) bool, (S,) labels."""

    embeddings: Tensor
    keep: Tensor
    labels: Tensor


def model_config(masked: bool) -> SlideModelConfig:
    """The bundled model's architecture: 0.8 million weights."""
    return SlideModelConfig(
        name="maskattn-demo" if masked else "maskattn-demo-unmasked",
        classes=CLASSES,
        tile_px=TILE_PX,
        spacing_um=SPACING_UM,
        tile_encoder={
            "img_size": TILE_PX,
            "patch_size": TOKEN_PX,
            "embed_dim": EMBED_DIM,
            "depth": 4,
            "num_heads": 3,
        },
        slide_encoder={
            "img_size": GRID,
            "embed_dim": EMBED_DIM,
            "depth": 2,
            "num_heads": 3,
        },
        masked=masked,
        pixel_mean=(0.80, 0.70, 0.82),
        pixel_std=(0.18, 0.24, 0.14),
        demonstration=True,
        note=NOTE,
    )


def train(plan: TrainingPlan, say: Callable[[str], None] = print) -> tuple[SlideModel, Losses]:
    """Train a model from nothing; the same plan on the same machine gives the same weights."""
    torch.manual_seed(plan.seed)
    rng = np.random.default_rng(plan.seed)
    model = SlideModel(model_config(plan.masked))
    losses = Losses()
    started = time.perf_counter()

    def report(text: str) -> None:
        say(f"[{time.perf_counter() - started:6.0f} s] {text}")

    with one_thread():
        train_tiles(model, plan, rng, losses.tiles, report)
        train_labels(model, plan, rng, losses.labels, report)
    return model.eval(), losses


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, for weights that do not depend on how many cores there are; so small a model gains little by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_tiles(
    model: SlideModel, plan: TrainingPlan, rng: np.random.Generator, losses: list[float], report: Callable[[str], None]
) -> None:
    """Stage 1: the tile encoder under a temporary head learns what tiles are made of."""
    tiles = draw_tiles(plan, rng)
    report(f"stage 1: {len(tiles.tiles)} tiles of {plan.tile_slides} slides drawn")
    head = nn.Linear(EMBED_DIM, len(KINDS))
    encoder = nn.ModuleDict({"encoder": model.tile_encoder, "head": head}).train()
    for step, loss_rate in enumerate(optimise(encoder, plan.tile_steps, rate=1e-3)):
        picked = torch.from_numpy(rng.integers(len(tiles.tiles), size=plan.tile_batch))
        pixels, keep = turn(rng, tiles.tiles[picked], tiles.keep[picked])
        loss = F.cross_entropy(head(model.encode_tiles(pixels, keep)), tiles.kinds[picked])
        loss_rate(loss)
        losses.append(loss.item())
        if step % 100 == 99:
            report(f"stage 1, step {step + 1}: loss {np.mean(losses[-100:]):.3f}")


def train_labels(
    model: SlideModel, plan: TrainingPlan, rng: np.random.Generator, losses: list[float], report: Callable[[str], None]
) -> None:
    """Stage 2: the slide encoder learns slide labels from the embeddings of fresh slides."""
    slides = encode_slides(model.eval(), plan)
    report(f"stage 2: {plan.label_slides} slides drawn and encoded")
    encoder = model.slide_encoder.train()
    for step, loss_rate in enumerate(optimise(encoder, plan.label_steps, rate=5e-4)):
        picked = torch.from_numpy(rng.integers(len(slides.labels), size=plan.label_batch))
        embeddings, keep = turn(rng, slides.embeddings[picked], slides.keep[picked])
        embeddings, keep = shift(rng, embeddings, keep)
        loss = F.cross_entropy(encoder(embeddings, keep), slides.labels[picked])
        loss_rate(loss)
        losses.append(loss.item())
        if step % 100 == 99:
            report(f"stage 2, step {step + 1}: loss {np.mean(losses[-100:]):.3f}")


def optimise(module: nn.Module, steps: int, rate: float) -> Iterator[Callable[[Tensor], None]]:
    """Yield for each step a function that takes its loss: AdamW, 5 % warm-up, cosine decay, clipped gradients."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.05)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * step / steps))
    )

    def take(loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()

    for _ in range(steps):
        yield take


def draw_tiles(plan: TrainingPlan, rng: np.random.Generator) -> TileSet:
    """Tiles for stage 1, half of them chosen where a lesion is, so that the rare kinds are seen."""
    tiles, keeps, kinds = [], [], []
    for index in range(plan.tile_slides):
        sample = sample_slide(plan.first_slide_seed + index, masked=plan.masked)
        diseased = sample.kinds_TK[:, 2:].sum(1) > 0
        weight = np.where(diseased, 0.5 / max(diseased.sum(), 1), 0.5 / max((~diseased).sum(), 1))
        count = min(plan.tiles_per_slide, len(weight))
        chosen = rng.choice(len(weight), count, replace=False, p=weight / weight.sum())
        tiles.append(sample.tiles_TCHW[chosen])
        keeps.append(sample.grid.token_keep_THW[chosen])
        kinds.append(sample.kinds_TK[chosen])
    return TileSet(*(torch.from_numpy(np.concatenate(part)) for part in (tiles, keeps, kinds)))


@torch.no_grad()
def encode_slides(model: SlideModel, plan: TrainingPlan) -> EncodedSlides:
    """Slides for stage 2, with classes in turn; none of them was used in stage 1."""
    embeddings = torch.zeros(plan.label_slides, EMBED_DIM, GRID, GRID)
    keep = torch.zeros(plan.label_slides, GRID, GRID, dtype=torch.bool)
    labels = torch.arange(plan.label_slides) % len(CLASSES)
    first = plan.first_slide_seed + plan.tile_slides
    for index in range(plan.label_slides):
        sample = sample_slide(first + index, masked=plan.masked, label=int(labels[index]))
        keep[index] = torch.from_numpy(sample.grid.keep_HW)
        tiles, tokens = torch.from_numpy(sample.tiles_TCHW), torch.from_numpy(sample.grid.token_keep_THW)
        rows = [model.encode_tiles(*part) for part in zip(tiles.split(64), tokens.split(64), strict=True)]
        embeddings[index][:, keep[index]] = torch.cat(rows).T
    return EncodedSlides(embeddings, keep, labels)


def turn(rng: np.random.Generator, grid: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Turn and mirror a batch of square grids (B, C, H, W) with their masks (B, h, w), all by the same symmetry."""
    quarter = int(rng.integers(4))
    grid, keep = torch.rot90(grid, quarter, (-2, -1)), torch.rot90(keep, quarter, (-2, -1))
    if rng.random() < 0.5:
        grid, keep = grid.flip(-1), keep.flip(-1)
    return grid.contiguous(), keep.contiguous()


def shift(rng: np.random.Generator, grid: Tensor, keep: Tensor, furthest: int = 3) -> tuple[Tensor, Tensor]:
    """Roll a batch of tile grids by a few tiles, so that the slide encoder does not learn places by heart."""
    by = tuple(int(step) for step in rng.integers(-furthest, furthest + 1, 2))
    return torch.roll(grid, by, (-2, -1)), torch.roll(keep, by, (-2, -1))


def main(arguments: list[str] | None = None) -> None:
    """Train and write the weights, with the configuration beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUNDLED_WEIGHTS, help="where to write x.safetensors and x.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unmasked", action="store_true", help="train the twin that sees glass too")
    parser.add_argument("--tile-steps", type=int, default=TrainingPlan.tile_steps)
    parser.add_argument("--label-steps", type=int, default=TrainingPlan.label_steps)
    options = parser.parse_args(arguments)
    plan = TrainingPlan(
        masked=not options.unmasked,
        seed=options.seed,
        tile_steps=options.tile_steps,
        label_steps=options.label_steps,
    )
    model, _ = train(plan, say=lambda text: print(text, flush=True))
    model.save(options.out, dtype=torch.float16)
    print(f"written: {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
