"""Real tissue pasted onto real glass: slides with known ground truth for every tile, through ``maskattn infer``.

Squares of GlaS, some of them malignant, are pasted onto the glass of a whole section. The tile encoder is pretrained.
The slide encoder is trained on bags of class tokens of GlaS's training squares to predict whether any square is
malignant: once masked, and once as a plain twin whose bags include tiles of glass. The judged slides have squares of
the test folder on the glass of another section.

Dimension key: B slides, T tiles, S×S cells of a slide, C channels, h·w tokens of a tile.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from bench.evidence.real_images import SIDE_PX, Crops, crops, normalised
from bench.evidence.real_judging import features_of
from bench.evidence.real_weights import Encoder
from bench.evidence.table import Row, markdown_table
from maskattn.explain import METHODS
from maskattn.explain.methods import DEFAULT_METHOD
from maskattn.explain.metrics import background_mass
from maskattn.nn import VisionTransformer
from maskattn.nn.slide_model import SlideModel, SlideModelConfig

__all__ = ["Truth", "judge_slides", "paste"]

SIDE, TISSUE, MALIGNANT = 5, 10, 5  # cells along a side; tiles with tissue; malignant tiles among these
GLASS, BENIGN, SICK = 0, 1, 2
CLASSES = ("benign", "malignant")


@dataclass(frozen=True)
class Truth:
    """A slide and the ground truth of its cells.

    Attributes:
        image_XY3: uint8 pixels.
        cells_SS: GLASS, BENIGN or SICK.
    """

    image_XY3: np.ndarray
    cells_SS: np.ndarray


def glass_of(path: Path, count: int, seed: int) -> list[np.ndarray]:
    """Cut squares (224, 224, 3) of glass from a section: those that are bright throughout, whatever their colour.

    Raises:
        ValueError: the first ninth of the section has too few of them.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # a whole section
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").crop((0, 0, image.width // 3, image.height // 3)))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    rng, squares = np.random.default_rng(seed), []
    for _ in range(50 * count):
        y, x = (int(rng.integers(0, side - SIDE_PX)) for side in pixels.shape[:2])
        square = pixels[y : y + SIDE_PX, x : x + SIDE_PX]
        if np.quantile(square.min(axis=2), 0.02) > 150:
            squares.append(square)
        if len(squares) == count:
            return squares
    raise ValueError(f"{path} must have {count} squares of glass in its first ninth, got {len(squares)}")


def paste(tissue: Crops, glass: list[np.ndarray], seed: int) -> Truth:
    """Compose a slide of malignant tissue, benign tissue and glass in random cells."""
    rng = np.random.default_rng(seed)
    kinds = np.array([SICK] * MALIGNANT + [BENIGN] * (TISSUE - MALIGNANT) + [GLASS] * (SIDE**2 - TISSUE))
    cells = rng.permutation(kinds).reshape(SIDE, SIDE)
    image = np.empty((SIDE * SIDE_PX, SIDE * SIDE_PX, 3), np.uint8)
    malignant = tissue.malignant_B.numpy()
    for (row, column), kind in np.ndenumerate(cells):
        if kind == GLASS:
            square = glass[int(rng.integers(len(glass)))]
        else:
            i = int(rng.choice(np.flatnonzero(malignant == (kind == SICK))))
            square = (tissue.pixels_B3XY[i].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        image[row * SIDE_PX : (row + 1) * SIDE_PX, column * SIDE_PX : (column + 1) * SIDE_PX] = square
    return Truth(image, cells)


def train_slide_encoder(model: SlideModel, features: dict[int, Tensor], steps: int, seed: int = 0) -> None:
    """Train on bags of class tokens at random cells, malignant or not; a plain model has glass in the other cells."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder = model.slide_encoder.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-4, weight_decay=0.05)
    for _ in range(steps):
        labels, bags = rng.integers(0, 2, 16), []
        loss: Tensor | float = 0.0
        for label in labels:
            sick = int(rng.integers(1, TISSUE)) * int(label)
            kinds = rng.permutation([SICK] * sick + [BENIGN] * (TISSUE - sick) + [GLASS] * (SIDE**2 - TISSUE))
            keep = torch.from_numpy(kinds != GLASS) if model.config.masked else torch.ones(SIDE**2, dtype=torch.bool)
            rows = [features[int(k)][int(rng.integers(len(features[int(k)])))] for k in kinds[keep.numpy()]]
            tokens = model.slide_tokens(torch.stack(rows), keep.view(SIDE, SIDE))
            bags.append(encoder.predict(encoder.before_last_block(tokens)))
        loss = F.cross_entropy(torch.cat(bags), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()


def slide_model(encoder: VisionTransformer, how: Encoder, masked: bool) -> SlideModel:
    """Return a slide model of the pretrained tower and a small, untrained slide encoder."""
    config = SlideModelConfig(
        name="pasted tissue, masked" if masked else "pasted tissue, plain",
        classes=CLASSES,
        tile_px=SIDE_PX,
        spacing_um=1.0,
        tile_encoder={
            "patch_size": 16,
            "embed_dim": 768,
            "depth": 12,
            "num_heads": 12,
            "pre_norm": True,
            "act_layer": "quick_gelu",
            "norm_eps": 1e-5,
        },
        slide_encoder={"embed_dim": 128, "depth": 2, "num_heads": 4, "img_size": SIDE},
        masked=masked,
        pixel_mean=how.mean,
        pixel_std=how.std,
        note="for the evidence only; of no use elsewhere",
    )
    torch.manual_seed(0)  # for the slide encoder's first weights
    model = SlideModel(config)
    model.tile_encoder.load_state_dict(encoder.state_dict())
    model.tile_encoder.requires_grad_(False)
    return model.eval()


def judge_slides(real: Path, encoder: VisionTransformer, how: Encoder, count: int, cache: Path) -> str:
    """Return the page's section: tile and token maps of pasted slides against the ground truth, masked and plain."""
    first, second = sorted((real / "sections").glob("*.jpg"))[:2]
    training, test = crops(real, "train"), crops(real, "test")
    glass = torch.stack([torch.from_numpy(x.copy()).permute(2, 0, 1).float() / 255 for x in glass_of(first, 16, 0)])
    tokens, of_glass = (
        features_of(encoder, normalised(x, how.mean, how.std), cache) for x in (training.pixels_B3XY, glass)
    )
    kinds = {BENIGN: tokens[~training.malignant_B], SICK: tokens[training.malignant_B], GLASS: of_glass}
    truths = [paste(test, glass_of(second, 30, 1), seed) for seed in range(count)]
    folder = cache / "slides"
    folder.mkdir(parents=True, exist_ok=True)
    for i, truth in enumerate(truths):
        tifffile.imwrite(folder / f"pasted_{i}.tif", truth.image_XY3, tile=(256, 256), photometric="rgb")
    rows = []
    for masked, method in ((False, DEFAULT_METHOD), (True, DEFAULT_METHOD), (True, "cdam")):
        word = "masked" if masked else "plain"
        path = folder / f"{word}.safetensors"
        if method == DEFAULT_METHOD:
            model = slide_model(encoder, how, masked)
            train_slide_encoder(model, kinds, steps=150)
            model.save(path)
        out = folder / f"{word}_{method}"
        command = [sys.executable, "-m", "maskattn", "infer", *(str(folder / f"pasted_{i}.tif") for i in range(count))]
        command += ["--model", str(path), "--out", str(out), "--tokens", "--overwrite", "--method", method]
        command += ["--spacing-um", "1.0", "--workers", "0", "--force", "--no-check"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        judged = [_judge(next(iter(sorted(out.glob(f"pasted_{i}*/relevance.h5")))), truths[i]) for i in range(count)]
        values = {key: torch.tensor([x[key] for x in judged]) for key in judged[0]}
        rows.append(Row(f"{word}, {METHODS[method].title}", values))
    return (
        f"### Real tissue on real glass, through `maskattn infer`\n\n{count} slides of {SIDE}×{SIDE} tiles, {TISSUE} "
        f"of them tissue and {MALIGNANT} of these malignant; the maps are of malignant less benign. "
        "Average precision (AP) against the malignant tiles, and against their tokens.\n\n"
        + markdown_table(rows, ("malignant", "tile AP", "token AP"), ("tile attention", "tile relevance"))
    )


def _judge(path: Path, truth: Truth) -> dict[str, float]:
    import h5py

    with h5py.File(path, "r") as file:
        coords = np.asarray(file["coords"])
        tiles_KT, tokens_KThw = np.asarray(file["tiles/relevance"]), np.asarray(file["tokens/relevance"])
        attention_T, keep_Thw = np.asarray(file["tiles/attention"]), np.asarray(file["tokens/keep"])
    kinds_T = truth.cells_SS[coords[:, 1] // SIDE_PX, coords[:, 0] // SIDE_PX]
    tiles_T, tokens_Thw = tiles_KT[1] - tiles_KT[0], tokens_KThw[1] - tokens_KThw[0]
    on_glass = torch.from_numpy(kinds_T == GLASS)[None, None]
    tissue, sick_Thw = kinds_T != GLASS, np.broadcast_to((kinds_T == SICK)[:, None, None], keep_Thw.shape)
    return {
        "tile attention on glass": float(background_mass(torch.from_numpy(attention_T)[None, None], on_glass)),
        "tile relevance on glass": float(background_mass(torch.from_numpy(tiles_T)[None, None], on_glass)),
        "tile AP": float(average_precision_score(kinds_T == SICK, tiles_T)),
        "tile AP in tissue": float(average_precision_score((kinds_T == SICK)[tissue], tiles_T[tissue])),
        "token AP": float(average_precision_score(sick_Thw[keep_Thw], tokens_Thw[keep_Thw])),
        "token AP in tissue": float(
            average_precision_score(sick_Thw[tissue][keep_Thw[tissue]], tokens_Thw[tissue][keep_Thw[tissue]])
        ),
    }
