"""README's first picture: attention of a pretrained encoder on real skin, plain and with glass masked.

    python -m bench.evidence.real_picture CMU-1-Small-Region.svs  # OpenSlide data, CC0; writes docs/images/real.png

CLIP's image tower sees the entire slide at a quarter of its size. The class map explains "epidermis rather than
dermis": the difference of the mean class tokens of four squares of each, at the positions below. Nothing is trained on
skin.

Dimension key: H·W grid tokens, C channels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from bench.evidence.figures import lay_over
from bench.evidence.real_images import SIDE_PX, normalised
from bench.evidence.real_weights import ENCODERS, load_encoder, missing
from maskattn.explain import METHODS, AttentionMap
from maskattn.explain.methods import DEFAULT_METHOD
from maskattn.explain.metrics import background_mass
from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue import find_tissue

_ENCODER, _REDUCTION, _TOKEN_PX = "CLIP ViT-B/16", 4, 16
# Centres of the squares of each tissue, level-0 px.
_EPIDERMIS = ((1170, 990), (1237, 2276), (709, 2606), (1154, 1848))
_DERMIS = ((990, 1320), (990, 2045), (957, 2804), (1452, 2112))


def squares(reader: SlideReader, centres: tuple[tuple[int, int], ...]) -> Tensor:
    """Read squares at full resolution, (B, 3, 224, 224) in 0 … 1."""
    half = SIDE_PX // 2
    read = [reader.read_region(x - half, y - half, (SIDE_PX, SIDE_PX), (SIDE_PX, SIDE_PX)) for x, y in centres]
    return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    """Read, explain, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide", type=Path)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "maskattn-evidence")
    parser.add_argument("--method", default=DEFAULT_METHOD)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/real.png"))
    arguments = parser.parse_args()
    why = missing(_ENCODER, arguments.cache)
    if why is not None:
        raise SystemExit(f"{_ENCODER} is not available: {why}")
    model, how = load_encoder(_ENCODER, arguments.cache), ENCODERS[_ENCODER]
    with SlideReader(arguments.slide) as reader:
        info = reader.info
        step = _REDUCTION * _TOKEN_PX
        rows, columns = info.height_px // step, info.width_px // step
        size = (columns * _TOKEN_PX, rows * _TOKEN_PX)
        pixels = reader.read_region(0, 0, (columns * step, rows * step), size)
        mask = find_tissue(reader).mask_HW.astype(np.float32)
        # The mask covers the entire slide; the token grid omits less than one token at the right and lower edges.
        reduced = cv2.resize(
            mask, (info.width_px // _REDUCTION, info.height_px // _REDUCTION), interpolation=cv2.INTER_AREA
        )
        tissue = cv2.resize(reduced[: size[1], : size[0]], (columns, rows), interpolation=cv2.INTER_AREA)
        own, other = (normalised(squares(reader, centres), how.mean, how.std) for centres in (_EPIDERMIS, _DERMIS))
    keep = torch.from_numpy(tissue > 0)[None]
    image = normalised(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255, how.mean, how.std)
    with torch.no_grad():
        direction = F.normalize(model(own).mean(dim=0) - model(other).mean(dim=0), dim=0)
    plain, masked = (AttentionMap(model).attribute(image, mask) for mask in (None, keep))
    relevance = METHODS[arguments.method](model).attribute(image, lambda z: z @ direction, keep)
    assert isinstance(relevance, Tensor)
    on_glass = [float(background_mass(x, ~keep)) for x in (plain, masked)]
    glass = 1 - float(keep.float().mean())
    print(f"{glass:.0%} of the tokens are glass; attention on it: plain {on_glass[0]:.3f}, masked {on_glass[1]:.3f}")
    titles = (
        "skin, H&E",
        f"attention, plain:\n{on_glass[0]:.0%} of it on glass",
        "attention, masked:\nexactly 0 on glass",
        f"epidermis (red) rather than\ndermis (blue), {METHODS[arguments.method].title}",
    )
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4)
    axes[0].imshow(pixels)
    for axis, values, signed in zip(axes[1:], (plain, masked, relevance), (False, False, True), strict=True):
        lay_over(axis, cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), values[0].numpy(), signed)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=100)


if __name__ == "__main__":
    main()
