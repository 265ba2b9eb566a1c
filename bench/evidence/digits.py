"""Explanations compared on images of two handwritten digits, whose positions are known.

    python -m bench.evidence.digits            # trains, judges every method, writes the table and the figures

The data are scikit-learn's bundled digits, enlarged and placed side by side on a textured background. Each image holds
two different digits, and a small vision transformer gives a logit for each of the ten. The judged images are made of
held-out digits that were never trained on. Everything is seeded; a run takes about twenty minutes on two cores.

Dimension key: B images, H·W grid tokens, K classes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from bench.evidence.explanations import HIGHER_IS_BETTER, LOWER_IS_BETTER, judge
from bench.evidence.figures import draw_maps
from bench.evidence.table import bar_figure, markdown_table, write_section
from maskattn.nn import VisionTransformer

HEIGHT_PX, WIDTH_PX, TOKEN_PX, DIGIT_PX = 48, 72, 6, 24
GRID_HW = (HEIGHT_PX // TOKEN_PX, WIDTH_PX // TOKEN_PX)
CLASSES = 10
TRAINING_DIGITS = 1200


@dataclass(frozen=True)
class Scenes:
    """Images of two digits and the positions of the digits.

    Attributes:
        images_BIXY: (B, 1, 48, 72), with a mean of about zero and unit range.
        classes_B2: (B, 2) int64, the classes of the left and the right digit, which always differ.
        areas_B2HW: (B, 2, H, W) bool, the tokens that hold ink of each digit.
    """

    images_BIXY: Tensor
    classes_B2: Tensor
    areas_B2HW: Tensor


def load_glyphs() -> tuple[Tensor, Tensor]:
    """Return (1797, 24, 24) ink in 0 … 1, and the classes, in a fixed random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    glyphs = F.interpolate(small, size=(DIGIT_PX, DIGIT_PX), mode="bilinear")[:, 0]
    return glyphs[order], torch.from_numpy(digits.target).long()[order]


def compose(glyphs: Tensor, labels: Tensor, count: int, seed: int) -> Scenes:
    """Draw scenes: two digits of different classes at random positions in the two halves, over texture."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(glyphs), (count, 2), generator=generator)
    while (same := labels[pick[:, 0]] == labels[pick[:, 1]]).any():
        pick[same, 1] = torch.randint(len(glyphs), (int(same.sum()),), generator=generator)
    half = WIDTH_PX // 2
    rows = torch.randint(HEIGHT_PX - DIGIT_PX + 1, (count, 2), generator=generator)
    columns = torch.randint(half - DIGIT_PX + 1, (count, 2), generator=generator) + torch.tensor([0, half])
    coarse = torch.rand(count, 1, HEIGHT_PX // 6, WIDTH_PX // 6, generator=generator)
    fine = torch.rand(count, 1, HEIGHT_PX // 2, WIDTH_PX // 2, generator=generator)
    ground = sum(F.interpolate(x, size=(HEIGHT_PX, WIDTH_PX), mode="bilinear") for x in (coarse, fine))
    ink = torch.zeros(count, 2, HEIGHT_PX, WIDTH_PX)
    for b, (corners, glyph_pair) in enumerate(zip(torch.stack([rows, columns], 2).tolist(), pick, strict=True)):
        for half_index, ((row, column), glyph) in enumerate(zip(corners, glyph_pair, strict=True)):
            ink[b, half_index, row : row + DIGIT_PX, column : column + DIGIT_PX] = glyphs[glyph]
    images = 0.35 * ground + ink.sum(dim=1, keepdim=True)
    areas = F.max_pool2d(ink, TOKEN_PX) > 0.3
    return Scenes((images - 0.5) / 0.5, labels[pick], areas)


def new_model(seed: int) -> VisionTransformer:
    """Return an untrained class-token ViT of three blocks for two-digit scenes."""
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=(HEIGHT_PX, WIDTH_PX),
        patch_size=TOKEN_PX,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=64,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
    ).eval()


def train(steps: int, seed: int = 0, batch: int = 64) -> VisionTransformer:
    """Train a model on scenes of the training digits, each seen once."""
    model = new_model(seed).train()
    glyphs, labels = (x[:TRAINING_DIGITS] for x in load_glyphs())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        scenes = compose(glyphs, labels, batch, seed=1_000_000 + step)
        truth = torch.zeros(batch, CLASSES).scatter_(1, scenes.classes_B2, 1.0)
        loss = F.binary_cross_entropy_with_logits(model(scenes.images_BIXY), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: VisionTransformer, scenes: Scenes) -> float:
    """Compute the share of images whose two largest logits are those of the two digits."""
    top = model(scenes.images_BIXY).topk(2, dim=1).indices.sort(dim=1).values
    return float((top == scenes.classes_B2.sort(dim=1).values).all(dim=1).float().mean())


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--perturbations", nargs="+", default=["drop", "blur", "mean"])
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    parser.add_argument("--weights", type=Path, help="file for the trained weights, which are loaded if it exists")
    arguments = parser.parse_args()
    if arguments.weights is not None and arguments.weights.exists():
        model = new_model(0)
        model.load_state_dict(torch.load(arguments.weights))
    else:
        model = train(arguments.steps)
        if arguments.weights is not None:
            torch.save(model.state_dict(), arguments.weights)
    glyphs, labels = (x[TRAINING_DIGITS:] for x in load_glyphs())
    scenes = compose(glyphs, labels, arguments.images, seed=7)
    right = accuracy(model, compose(glyphs, labels, 1000, seed=8))
    print(f"both digits right in {right:.1%} of 1000 held-out images", flush=True)
    rows, maps = judge(
        model, scenes.images_BIXY, scenes.classes_B2, scenes.areas_B2HW, perturbations=arguments.perturbations
    )
    images = arguments.page.parent / "images"
    bar_figure(rows, images / "evidence_digits_metrics.png")
    draw_maps(scenes.images_BIXY[:4, 0].numpy(), scenes.classes_B2[:4].tolist(), maps, images / "evidence_digits.png")
    table = markdown_table(rows, HIGHER_IS_BETTER, LOWER_IS_BETTER)
    text = (
        f"{arguments.images} held-out images; the model names both digits in {right:.1%} of 1000. Mean ± standard "
        f"error over images; the best of each column in bold.\n\n{table}"
    )
    write_section(arguments.page, "digits", text)
    print(text)


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
