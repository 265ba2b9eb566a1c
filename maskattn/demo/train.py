"""Training of the bundled model: ``python -m maskattn.demo.train``.

Stage 1 trains the tile encoder to predict the composition of a tile: a temporary linear head gives the shares of glass,
benign, low and high in the tokens that take part, while random tokens are left out. Stage 2 draws other slides, encodes
them once, and trains the slide encoder on slide labels only, with random tiles left out and slides mixed with one
another. Both make the answer a matter of degree: a model that is certain after one lesion tile would have a flat
gradient at all others, and its class map would show noise.

Every slide is drawn from its seed; seeds below :data:`FIRST_TRAINING_SEED` are never trained on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskattn.demo.samples import KINDS, TILE_PX, TOKEN_PX, sample_slide
from maskattn.demo.synthetic import CLASSES, SPACING_UM
from maskattn.nn.slide_model import SlideModel, SlideModelConfig
from maskattn.nn.slide_models.card import ModelCard
from maskattn.nn.slide_models.folder import save_model
from maskattn.nn.slide_models.two_stage import card_of
from maskattn.training.fit_settings import FitSettings

__all__ = [
    "BUNDLED_MODEL",
    "BUNDLED_WEIGHTS",
    "FIRST_TRAINING_SEED",
    "Losses",
    "TrainingPlan",
    "demo_card",
    "main",
    "model_config",
    "train",
]

BUNDLED_MODEL = Path(__file__).with_name("model")
BUNDLED_WEIGHTS = BUNDLED_MODEL / "model.safetensors"
FIRST_TRAINING_SEED = 1_000_000
EMBED_DIM = 96
GRID = 16
NOTE = (
    "Demonstration model, trained on synthetic slides by python -m maskattn.demo.train. Its classes mean nothing on "
    "real tissue."
)


@dataclass(frozen=True)
class TrainingPlan:
    """The amount of data and the length of each stage; the defaults produced the bundled weights.

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
    tile_slides: int = 180
    tiles_per_slide: int = 64
    tile_steps: int = 800
    tile_batch: int = 64
    label_slides: int = 300
    label_steps: int = 800
    label_batch: int = 32

    @property
    def first_slide_seed(self) -> int:
        """Seed of the first training slide."""
        return FIRST_TRAINING_SEED * (1 + self.seed)


@dataclass
class Losses:
    """Training losses of both stages, in the order of the steps."""

    tiles: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TileSet:
    """Tiles of many slides for stage 1: (M, 3, P, P) uint8, (M, h, w) bool, (M, 4, h, w) shares of each kind."""

    tiles: Tensor
    keep: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class EncodedSlides:
    """Slides for stage 2: (S, C, H, W) tile embeddings at their grid positions, (S, H, W) bool, (S,) labels."""

    embeddings: Tensor
    keep: Tensor
    labels: Tensor


def model_config(masked: bool) -> SlideModelConfig:
    """Return the bundled model's architecture: 0.7 million weights."""
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
            "depth": 1,
            "num_heads": 3,
        },
        masked=masked,
        pixel_mean=(0.80, 0.70, 0.82),
        pixel_std=(0.18, 0.24, 0.14),
        demonstration=True,
        note=NOTE,
    )


def demo_card(model: SlideModel) -> ModelCard:
    """Return the card of a model that was trained by this module."""
    trained_on = (
        "synthetic slides that python -m maskattn.demo.train draws: glass, tissue without a lesion, and lesions of two "
        "textures; the slide's class is that of its lesion"
    )
    return replace(card_of(model), trained_on=trained_on)


def train(plan: TrainingPlan, say: Callable[[str], None] = print) -> tuple[SlideModel, Losses]:
    """Train a model from scratch; the same plan on the same machine gives the same weights."""
    torch.manual_seed(plan.seed)
    rng = np.random.default_rng(plan.seed)
    model = SlideModel(model_config(plan.masked))
    for encoder, size in ((model.tile_encoder, 3.0), (model.slide_encoder, 1.0)):
        # a large class token keeps the last norm near linear, so that relevance grows with evidence
        nn.init.normal_(cast(Tensor, encoder.cls_token), std=size)
    losses = Losses()
    started = time.perf_counter()

    def report(text: str) -> None:
        say(f"[{time.perf_counter() - started:6.0f} s] {text}")

    with one_thread():
        head = train_tiles(model, plan, rng, losses.tiles, report)
        read_kinds(model, head)
        train_labels(model, plan, rng, losses.labels, report)
    return model.eval(), losses


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, so that weights do not depend on the number of cores; so small a model gains little from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_tiles(
    model: SlideModel, plan: TrainingPlan, rng: np.random.Generator, losses: list[float], report: Callable[[str], None]
) -> nn.Linear:
    """Stage 1: train the tile encoder and a temporary head to predict the composition of tiles; return the head."""
    tiles = draw_tiles(plan, rng)
    report(f"stage 1: {len(tiles.tiles)} tiles of {plan.tile_slides} slides drawn")
    head = nn.Linear(EMBED_DIM, len(KINDS))
    encoder = nn.ModuleDict({"encoder": model.tile_encoder, "head": head}).train()

    def loss_of_step() -> Tensor:
        picked = torch.from_numpy(rng.integers(len(tiles.tiles), size=plan.tile_batch))
        pixels, keep, kinds = rotated(rng, tiles.tiles[picked], tiles.keep[picked], tiles.kinds[picked])
        keep = leave_out_tokens(rng, keep)
        weight = keep[:, None].float()
        shares = (kinds * weight).sum((2, 3)) / weight.sum((2, 3))
        return (head(model.encode_tiles(pixels, keep)) - shares).square().sum(1).mean()

    _fit(encoder, loss_of_step, plan.tile_steps, _settings(plan, 1e-3), _kept("stage 1", losses, report))
    return head


def read_kinds(model: SlideModel, head: nn.Linear) -> None:
    """Restrict the slide encoder's input to the head's predictions, by a fixed projection of the embeddings.

    Directions in which no embedding of the training slides varies would keep their random weights and add noise to
    every token's relevance. Shares sum to 1, so the mean over kinds is such a direction, too.
    """
    projection = model.slide_encoder.patch_embed.proj
    spread = torch.linalg.qr(torch.randn(EMBED_DIM, len(KINDS)))[0] * EMBED_DIM**0.5 / 2
    with torch.no_grad():
        projection.weight.copy_((spread @ (head.weight - head.weight.mean(0)))[:, :, None, None])
        cast(Tensor, projection.bias).copy_(torch.randn(EMBED_DIM) + spread @ (head.bias - head.bias.mean()))
    projection.weight.requires_grad_(False)


def train_labels(
    model: SlideModel, plan: TrainingPlan, rng: np.random.Generator, losses: list[float], report: Callable[[str], None]
) -> None:
    """Stage 2: train the slide encoder on slide labels, from the embeddings of other slides."""
    slides = encode_slides(model.eval(), plan)
    report(f"stage 2: {plan.label_slides} slides drawn and encoded")
    encoder = model.slide_encoder.train()

    def loss_of_step() -> Tensor:
        picked = torch.from_numpy(rng.integers(len(slides.labels), size=plan.label_batch))
        embeddings, keep = rotated(rng, slides.embeddings[picked], slides.keep[picked])
        embeddings, keep = shift(rng, embeddings, keep)
        embeddings, keep, labels = mix(rng, embeddings, keep, F.one_hot(slides.labels[picked], len(CLASSES)).float())
        keep &= random_like(rng, keep) > 0.9 * random_like(rng, keep[:, :1, :1])
        return F.cross_entropy(encoder(embeddings, keep), labels)

    _fit(encoder, loss_of_step, plan.label_steps, _settings(plan, 5e-4), _kept("stage 2", losses, report))


def _fit(network: nn.Module, loss_of_step: Callable[[], Tensor], steps: int, settings: FitSettings, keep: Any) -> None:
    from maskattn.training.steps import fit_steps  # needs the extra "train", which using the bundled model does not

    fit_steps(network, loss_of_step, steps, settings, keep)


def _settings(plan: TrainingPlan, rate: float) -> FitSettings:
    return FitSettings(epochs=1, lr=rate, weight_decay=0.5, seed=plan.seed, device="cpu")


def _kept(stage: str, losses: list[float], report: Callable[[str], None]) -> Callable[[float], None]:
    """Return a function that records a step's loss and reports the mean of every hundred."""

    def keep(loss: float) -> None:
        losses.append(loss)
        if len(losses) % 100 == 0:
            report(f"{stage}, step {len(losses)}: loss {np.mean(losses[-100:]):.4f}")

    return keep


def draw_tiles(plan: TrainingPlan, rng: np.random.Generator) -> TileSet:
    """Draw tiles for stage 1, half of them from lesions, so that the rare kinds are represented."""
    tiles, keeps, kinds = [], [], []
    for index in range(plan.tile_slides):
        sample = sample_slide(plan.first_slide_seed + index, masked=plan.masked)
        diseased = sample.lesion_THW.any((1, 2))
        weight = np.where(diseased, 0.5 / max(diseased.sum(), 1), 0.5 / max((~diseased).sum(), 1))
        count = min(plan.tiles_per_slide, len(weight))
        chosen = rng.choice(len(weight), count, replace=False, p=weight / weight.sum())
        tiles.append(sample.tiles_TCHW[chosen])
        keeps.append(sample.grid.token_keep_THW[chosen])
        kinds.append(sample.kinds_TKHW[chosen])
    return TileSet(*(torch.from_numpy(np.concatenate(arrays)) for arrays in (tiles, keeps, kinds)))


@torch.no_grad()
def encode_slides(model: SlideModel, plan: TrainingPlan) -> EncodedSlides:
    """Draw and encode slides for stage 2, cycling through the classes; none of them was used in stage 1."""
    embeddings = torch.zeros(plan.label_slides, EMBED_DIM, GRID, GRID)
    keep = torch.zeros(plan.label_slides, GRID, GRID, dtype=torch.bool)
    labels = torch.arange(plan.label_slides) % len(CLASSES)
    first = plan.first_slide_seed + plan.tile_slides
    for index in range(plan.label_slides):
        sample = sample_slide(first + index, masked=plan.masked, label=int(labels[index]))
        keep[index] = torch.from_numpy(sample.grid.keep_HW)
        tiles, tokens = torch.from_numpy(sample.tiles_TCHW), torch.from_numpy(sample.grid.token_keep_THW)
        rows = [model.encode_tiles(*chunk) for chunk in zip(tiles.split(64), tokens.split(64), strict=True)]
        embeddings[index][:, keep[index]] = torch.cat(rows).T
    return EncodedSlides(embeddings, keep, labels)


def rotated(rng: np.random.Generator, *grids: Tensor) -> list[Tensor]:
    """Rotate and mirror batches of square grids (B, ..., H, W), all in the same way."""
    quarter, mirrored = int(rng.integers(4)), rng.random() < 0.5
    turned = [torch.rot90(grid, quarter, (-2, -1)) for grid in grids]
    return [(grid.flip(-1) if mirrored else grid).contiguous() for grid in turned]


def shift(rng: np.random.Generator, grid: Tensor, keep: Tensor, furthest: int = 3) -> tuple[Tensor, Tensor]:
    """Roll a batch of tile grids by a few tiles, so that the slide encoder does not memorise positions."""
    by = tuple(int(step) for step in rng.integers(-furthest, furthest + 1, 2))
    return torch.roll(grid, by, (-2, -1)), torch.roll(keep, by, (-2, -1))


def leave_out_tokens(rng: np.random.Generator, keep: Tensor) -> Tensor:
    """Drop up to nine tenths of each tile's tokens (B, h, w), singly or in patches, but never all of them."""
    singly = random_like(rng, keep)
    patches = F.interpolate(random_like(rng, keep[:, None, :3, :3]), keep.shape[1:], mode="bilinear")[:, 0]
    level = torch.where(random_like(rng, keep[:, :1, :1]) < 0.5, singly, patches)
    fewer = keep & (level > 0.9 * random_like(rng, keep[:, :1, :1]))
    return torch.where(fewer.any(2).any(1)[:, None, None], fewer, keep)


def mix(rng: np.random.Generator, grid: Tensor, keep: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace a random share of the cells of three in ten slides by another slide's; labels (B, K) follow the share.

    This is CutMix (Yun et al., arXiv 1905.04899) on grids of tile embeddings, cell by cell.
    """
    other = torch.from_numpy(rng.permutation(len(grid)))
    share = random_like(rng, keep[:, :1, :1]) * (random_like(rng, keep[:, :1, :1]) < 0.3)
    swapped = random_like(rng, keep) < share
    own, foreign = (keep & ~swapped).sum((1, 2)), (keep[other] & swapped).sum((1, 2))
    weight = (own / (own + foreign).clamp(min=1))[:, None]
    return (
        torch.where(swapped[:, None], grid[other], grid),
        torch.where(swapped, keep[other], keep),
        weight * labels + (1 - weight) * labels[other],
    )


def random_like(rng: np.random.Generator, grid: Tensor) -> Tensor:
    """Draw uniform numbers in [0, 1) of a tensor's shape."""
    return torch.from_numpy(rng.random(grid.shape, dtype=np.float32))


def main(arguments: list[str] | None = None) -> None:
    """Train, and write the weights and the configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=BUNDLED_MODEL, help="folder to write, or x.safetensors for a pair of files"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unmasked", action="store_true", help="train the unmasked twin, which also sees glass")
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
    if options.out.suffix == ".safetensors":
        model.save(options.out, dtype=torch.float16)
    else:
        save_model(options.out, model, demo_card(model), dtype=torch.float16)
    print(f"written: {options.out} ({options.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
