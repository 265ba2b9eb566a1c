"""The effect of dropping background tokens on a frozen encoder's features, by the share of a tile that is kept.

    python -m bench.evidence.token_mask --slide CMU-1-Small-Region.svs --slide section.jpg=2.0 --cache DIR

For each slide (``FILE`` or ``FILE=µm per pixel``; a plain picture is converted to a slide), tiles of 224 px that
overlap by half and are partly covered are encoded whole and with masked attention by two pretrained encoders
(real_weights.py gives their sources; DIR caches them), at 0.5 µm per pixel or the slide's own spacing if that is
coarser. The page gives the cosine of both features by the share of kept tokens, how often the nearest of all whole
features is the tile's own, and the similarity of different tiles. Writes bench/results/token_mask.md.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor

from bench.evidence.real_weights import ENCODERS, load_encoder, missing
from maskattn.nn import TileEncoder
from maskattn.nn.encoders import EncoderCard
from maskattn.slide.reader import SlideReader
from maskattn.slide.stream import stream_tiles
from maskattn.slide.tile_places import lay_tiles, with_tokens
from maskattn.slide.tissue import find_tissue

RESULTS = Path(__file__).parents[1] / "results" / "token_mask.md"
TILE_PX, OVERLAP_PX, SPACING_UM = 224, 112, 0.5
EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slide", action="append", required=True, help="FILE, or FILE=µm per pixel")
    parser.add_argument("--cache", type=Path, required=True, help="folder that caches the encoders")
    parser.add_argument("--most", type=int, default=60, help="partly covered tiles of each slide, evenly spaced")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    parts = [f"# Masked and whole tiles\n\n`{' '.join(_command(arguments))}`\n\n{_explanation()}"]
    for name, encoder in ENCODERS.items():
        reason = missing(name, arguments.cache)
        if reason is not None:
            print(f"{name} is left out: {reason}")
            continue
        card = EncoderCard(name, "token", encoder.mean, encoder.std, TILE_PX, TILE_PX)
        tiles = TileEncoder(load_encoder(name, arguments.cache), card)
        compared = [_compare(slide, tiles, arguments.most) for slide in arguments.slide]
        parts.append(f"## {name}\n\n" + "\n".join(_table(compared)))
    arguments.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


@torch.inference_mode()
def _compare(slide: str, encoder: TileEncoder, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute, for each tile: share of kept tokens, cosine of both features, whether its own whole feature is nearest.

    The last two values are the cosines of whole features to the nearest other tile and to a random one.
    """
    path, _, spacing = slide.partition("=")
    with (
        tempfile.TemporaryDirectory() as folder,
        SlideReader(_as_slide(Path(path), Path(folder)), float(spacing) if spacing else None) as reader,
    ):
        tissue = find_tissue(reader, force=True)
        places = lay_tiles(
            reader.info,
            tissue,
            patch_px=TILE_PX,
            overlap_px=OVERLAP_PX,
            spacing_um=max(SPACING_UM, reader.info.spacing_um),
            tile_px=TILE_PX,
            min_tissue=0.0,
        )
        places = with_tokens(places, tissue, encoder.token_px)
        partly = np.flatnonzero(~places.token_keep_THW.all(axis=(1, 2)))
        rows = partly[:: -(-len(partly) // most)]
        whole, masked = [], []
        for batch in stream_tiles(reader, places, batch_size=16, rows=rows):
            keep = torch.from_numpy(places.token_keep_THW[batch.rows_B.numpy()])
            whole.append(encoder.encode_tiles(batch.tiles_BCHW))
            masked.append(encoder.encode_tiles(batch.tiles_BCHW, keep))
    keep = torch.from_numpy(places.token_keep_THW[rows])
    whole_TC, masked_TC = (torch.nn.functional.normalize(torch.cat(parts)) for parts in (whole, masked))
    alike_TT = whole_TC @ whole_TC.T
    cosine_T = (whole_TC * masked_TC).sum(dim=1)
    own_T = (masked_TC @ whole_TC.T).argmax(dim=1) == torch.arange(len(cosine_T))
    random_T = alike_TT[torch.arange(len(cosine_T)), torch.randperm(len(cosine_T))]
    nearest_T = alike_TT.fill_diagonal_(-1).max(dim=1).values
    print(f"{path}: {len(cosine_T)} tiles, {keep.float().mean():.2f} of their tokens kept", flush=True)
    return keep.flatten(1).float().mean(dim=1), cosine_T, own_T, nearest_T, random_T


def _as_slide(path: Path, folder: Path) -> Path:
    """Return the slide itself, or a tiled TIFF of a plain picture."""
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        return path
    slide = folder / f"{path.stem}.tiff"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    tifffile.imwrite(slide, pixels, photometric="rgb", tile=(512, 512), compression="zlib", metadata=None)
    return slide


def _table(compared: Sequence[tuple[Tensor, ...]]) -> list[str]:
    share, cosine, own, nearest, random = (torch.cat(parts) for parts in zip(*compared, strict=True))
    lines = ["| kept tokens | tiles | cosine, median | lowest tenth | nearest is its own |", "|---|---|---|---|---|"]
    for low, high in itertools.pairwise(EDGES):
        chosen = (share > low) & (share <= high)
        if not bool(chosen.any()):
            continue
        values = cosine[chosen]
        name = f"{low:.0%} to {high:.0%}" + (", not all" if high == 1 else "")
        lines.append(
            f"| {name} | {len(values)} | {values.median():.3f} | {values.quantile(0.1):.3f} | "
            f"{own[chosen].float().mean():.0%} |"
        )
    lines.append(
        f"\nTwo different tiles, both whole: cosine {random.median():.3f} at random, {nearest.median():.3f} to the "
        "nearest (medians)."
    )
    return lines


def _explanation() -> str:
    return (
        f"Tiles of {TILE_PX} px that overlap by half and are partly covered by tissue, encoded whole and with masked "
        "attention; the slides' names stand in the command. The last column: of all whole features of the slide, how "
        "often that of the same tile is nearest to the masked feature."
    )


def _command(arguments: argparse.Namespace) -> list[str]:
    slides = [part for slide in arguments.slide for part in ("--slide", Path(slide).name)]
    return ["python", "-m", "bench.evidence.token_mask", *slides, "--cache", "DIR", "--most", str(arguments.most)]


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
