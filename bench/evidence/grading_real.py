"""Real tissue with marks that correlate with the label: colon glands on glass, frozen encoders, linear probes.

A piece of each of GlaS's training images is pasted onto a square of glass. In the probes' training data, a pen stroke
next to it agrees with the label in nine of ten images. Probes are judged by leaving one patient out, on the same pieces
with the marks of training, without marks, and with uninformative marks. Marks are only on tokens of glass, so masked
features do not depend on them at all; plain features of the unmarked squares are those of glass set to white.

Dimension key: B images, H·W grid tokens, C channels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor

from bench.evidence.real_images import SIDE_PX, Crops, crops, normalised
from bench.evidence.real_judging import features_of
from bench.evidence.real_probes import Probes
from bench.evidence.real_weights import ENCODERS, load_encoder, missing
from maskattn.demo.textures import blob, fill
from maskattn.nn import VisionTransformer

__all__ = ["MARKS", "encode_masked", "on_glass", "real_section", "scores_of"]

MARKS = ("as in training", "none", "shuffled")
_GLASS = 0.955
_TELLS = 0.9  # share of informative marks that agree with the label
_TOKEN_PX = 16  # distance of marks from tissue, at least the side of a token
_INKS = ((0.14, 0.31, 0.68), (0.16, 0.18, 0.20))


def on_glass(squares: Crops, marks: str, seed: int) -> tuple[Tensor, Tensor]:
    """Paste pieces of tissue onto glass, (B, 3, 224, 224) in 0 … 1; also return the tissue (B, 224, 224) bool.

    The pieces and their positions are the same whatever the marks.

    Args:
        squares: squares of tissue.
        marks: one of :data:`MARKS`.
        seed: seed of every choice.
    """
    images, tissue = [], []
    for i, (pixels, malignant) in enumerate(zip(squares.pixels_B3XY, squares.malignant_B.tolist(), strict=True)):
        rng = np.random.default_rng([seed, i])
        piece = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        centre = rng.uniform(0.42, 0.58, 2) * SIDE_PX
        fill(piece, blob(rng, rng.uniform(48, 58), rng.uniform(1.0, 1.5), 0.15) + centre, 255)
        piece[[0, -1]], piece[:, [0, -1]] = 0, 0
        inside = torch.from_numpy(piece > 0)
        image = torch.where(inside, pixels, torch.full_like(pixels, _GLASS))
        stroke, ink, marked = _stroke(rng, piece), _INKS[int(rng.integers(2))], rng.random() < 0.5
        if rng.random() < _TELLS and marks == MARKS[0]:
            marked = malignant
        if marked and marks != MARKS[1]:
            colour = torch.tensor(ink)[:, None, None]
            image = image + stroke * (colour - image)
        images.append(image)
        tissue.append(inside)
    return torch.stack(images), torch.stack(tissue)


def _stroke(rng: np.random.Generator, piece: np.ndarray) -> Tensor:
    """Draw (224, 224) in 0 … 1, the ink of a stroke that does not touch the tissue."""
    free = cv2.dilate(piece, np.ones((2 * _TOKEN_PX + 1,) * 2, np.uint8)) == 0
    corners = np.array([(36, 36), (36, 188), (188, 36), (188, 188)])
    room = [int(free[max(0, y - 34) : y + 34, max(0, x - 34) : x + 34].sum()) for x, y in corners]
    angle = np.linspace(0, rng.uniform(3, 5.5), 40)[:, None] + rng.uniform(0, 6)
    line = corners[int(np.argmax(room))] + np.concatenate([np.cos(angle), np.sin(angle)], 1) * rng.uniform(16, 26, 2)
    ink = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    cv2.polylines(ink, [np.rint(line).astype(np.int32)], False, 230, int(rng.integers(5, 9)), cv2.LINE_AA)
    ink[~free] = 0
    return torch.from_numpy(ink).float() / 255


def encode_masked(model: VisionTransformer, images: Tensor, keep_BHW: Tensor, cache: Path | None = None) -> Tensor:
    """Compute class tokens (B, C) without glass, cached in a folder."""
    digest = hashlib.sha1(images.numpy().tobytes() + keep_BHW.numpy().tobytes())
    digest.update(model.norm.weight.detach().numpy().tobytes())
    path = None if cache is None else cache / f"masked_features_{digest.hexdigest()[:16]}.pt"
    if path is not None and path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    with torch.no_grad():
        features = torch.cat([model(x, k) for x, k in zip(images.split(16), keep_BHW.split(16), strict=True)])
    if path is not None:
        torch.save(features, path)
    return features


def scores_of(training_BC: Tensor, asked_BC: Tensor, squares: Crops, strength: float) -> np.ndarray:
    """Compute malignant logits (B,), each from a probe that has not seen the image's patient."""
    probes, logits = Probes(training_BC, squares.malignant_B, squares.patients, strength), []
    for features_C, patient in zip(asked_BC, squares.patients, strict=True):
        weight, bias = probes.without([patient])
        logits.append(float(features_C @ weight + bias))
    return np.array(logits)


def _interval(scores_B: np.ndarray, squares: Crops, seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % interval of the area under the ROC curve over resamples of the patients with their images."""
    rng, patients = np.random.default_rng(seed), np.array(squares.patients)
    names, truth = np.unique(patients), squares.malignant_B.numpy()
    rows_of = {name: np.flatnonzero(patients == name) for name in names}
    areas = []
    for _ in range(1000):
        rows = np.concatenate([rows_of[name] for name in rng.choice(names, len(names))])
        if 0 < truth[rows].sum() < len(rows):
            areas.append(roc_auc_score(truth[rows], scores_B[rows]))
    low, high = np.quantile(areas, (0.025, 0.975))
    return float(low), float(high)


def _one_of_each(squares: Crops, quick: bool) -> Crops:
    """Return the left square of every image; for a trial, of a few images of both kinds and several patients."""
    rows = torch.arange(0, len(squares.names), 2)
    if quick:
        kinds = [rows[squares.malignant_B[rows] == wanted] for wanted in (False, True)]
        rows = torch.cat([kind[:: max(1, len(kind) // 4)] for kind in kinds])
    return Crops(
        [squares.names[i] for i in rows],
        [squares.patients[i] for i in rows],
        squares.pixels_B3XY[rows],
        squares.malignant_B[rows],
        squares.glands_BXY[rows],
    )


def _rows(real: Path, cache: Path, encoder: str, quick: bool) -> list[str]:
    how, model = ENCODERS[encoder], load_encoder(encoder, cache)
    squares = _one_of_each(crops(real, "train"), quick)
    plain, tissue = {}, torch.empty(0)
    for marks in MARKS:
        images, tissue = on_glass(squares, marks, seed=5)
        plain[marks] = features_of(model, normalised(images, how.mean, how.std), cache)
    images = normalised(on_glass(squares, MARKS[0], seed=5)[0], how.mean, how.std)
    grid = model.patch_embed.grid_of(images)
    keep = F.adaptive_max_pool2d(tissue[:, None].float(), grid)[:, 0] > 0
    masked = encode_masked(model, images, keep, cache)
    contenders = {
        "plain": {marks: (plain[MARKS[0]], plain[marks]) for marks in MARKS},
        "plain, glass set to white": dict.fromkeys(MARKS, (plain["none"], plain["none"])),
        "masked": dict.fromkeys(MARKS, (masked, masked)),
        "masked at inference alone": dict.fromkeys(MARKS, (plain[MARKS[0]], masked)),
    }
    lines, truth = [], squares.malignant_B.numpy()
    for name, pairs in contenders.items():
        cells = []
        for training, asked in pairs.values():
            scores = scores_of(training, asked, squares, strength=1.0)
            low, high = _interval(scores, squares)
            right = accuracy_score(truth, scores > 0)
            cells.append(f"{roc_auc_score(truth, scores):.3f} ({low:.3f} … {high:.3f}), {right:.3f}")
        lines.append(f"| {encoder}, {name} | " + " | ".join(cells) + " |")
    return [f"{len(squares.names)} pieces of {len(set(squares.patients))} patients", *lines]


def real_section(real: Path, cache: Path, quick: bool = False) -> str:
    """The table of every encoder that can be had; what cannot is named with its reason."""
    if not (real / "glas").is_dir():
        return f"Left out: {real} has no glas."
    rows, said, why = [], "", []
    for encoder in list(ENCODERS)[::-1]:
        reason = missing(encoder, cache)
        if reason is None:
            said, *lines = _rows(real, cache, encoder, quick)
            rows += lines
        else:
            why.append(f"Left out: {encoder}, {reason}.")
    if not rows:
        return " ".join(why)
    head = "| | " + " | ".join(f"marks {marks}" for marks in MARKS) + " |\n" + "|---" * (len(MARKS) + 1) + "|"
    return (
        f"{said}, each judged by a probe that has not seen its patient. Area under the curve with its 95 % interval "
        "over resampled patients, and accuracy.\n\n" + "\n".join([head, *rows]) + "\n\n" + " ".join(why)
    )
