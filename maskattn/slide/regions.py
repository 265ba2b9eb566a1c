"""HIPT on a slide's regions, which are encoded and explained one by one at the resolution of tokens.

Memory holds the pixels, kept patches and tokens of one region at a time, and only the embeddings of the others. With
``token_mask="tissue"`` background takes no part at any of the three levels; with "none" regions are chosen by tissue,
and every patch and token of a region takes part, as in HIPT models that were trained without masks.

Dimension key: T regions with tissue that could be read, N patches of a region, P kept patches, C channels, K classes,
(h, w) tokens of a region, H·W regions of the slide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.explain.factorised import FactorisedAttention, FactorisedMaps
from maskattn.explain.hierarchical import RelevanceMap
from maskattn.explain.three_levels import RegionMaps, ThreeLevelCDAM
from maskattn.nn.hipt import HIPT, PatchLevel, RegionPatches
from maskattn.nn.region_model import RegionModel
from maskattn.packing import unpack
from maskattn.shapes import Bool, Float, Int
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.layouts.hierarchical import RegionFeatures
from maskattn.slide.layouts.lattice import grid_cells
from maskattn.slide.layouts.tile_features import TokenMask
from maskattn.slide.reader import SlideInfo, SlideReader
from maskattn.slide.stream import stream_tiles
from maskattn.slide.tissue import TissueMask

__all__ = [
    "EncodedPatches",
    "EncodedRegions",
    "ExplainedRegion",
    "encode_patches",
    "encode_regions",
    "encode_stored_regions",
    "explain_regions",
    "lay_regions",
]

TakePatches = Callable[[np.ndarray, int], None]
"""Takes the features (N, C) of a region's patches, zeros for those left out, and the region's index in the grid."""


@dataclass(frozen=True, eq=False)
class EncodedRegions:
    """Embeddings of the regions that could be read.

    Attributes:
        embeddings_TC: (T, C), in the grid's order.
        rows_T: (T,) their indices among the grid's kept regions.
        keep_HW: (H, W) bool, True for the slide's regions that are encoded.
        reason: why the first unreadable region could not be read; None if all could.
    """

    embeddings_TC: Float[Tensor, "T C"]
    rows_T: Int[np.ndarray, " T"]
    keep_HW: Bool[Tensor, "H W"]
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class EncodedPatches:
    """The patches of one region.

    Attributes:
        row: the region's index among the grid's kept regions.
        features_PC: (P, C) features of its kept patches.
        patches: the kept patches; empty for an unreadable region.
        reason: why the region cannot be read; None if it can.
    """

    row: int
    features_PC: Float[Tensor, "P C"]
    patches: RegionPatches
    reason: str | None

    def features_NC(self) -> Float[np.ndarray, "N C"]:  # noqa: N802 (the dimension key)
        """Return features (N, C) of all patches, zeros for those left out."""
        dense: np.ndarray = unpack(self.features_PC, self.patches.packing)[0].float().cpu().numpy()
        return dense


@dataclass(frozen=True, eq=False)
class ExplainedRegion:
    """The maps of one region.

    Attributes:
        index: the region's index among the T encoded regions.
        keep_hw: (h, w) bool, True for tokens that take part.
        relevance: signed scores of its patches and tokens, with a batch dimension of 1.
        attention: the factorised attention map, with a batch dimension of 1.
    """

    index: int
    keep_hw: Bool[np.ndarray, "h w"]
    relevance: RegionMaps
    attention: FactorisedMaps


def lay_regions(
    info: SlideInfo,
    tissue: TissueMask,
    *,
    token_px: int = 16,
    region_px: int = 4096,
    spacing_um: float = 0.5,
    token_mask: TokenMask = "tissue",
) -> TokenGrid:
    """Lay regions over a slide from its level-0 corner, and keep those with tissue.

    Args:
        info: the slide's size and spacing.
        tissue: the tissue mask.
        token_px: side of a token in pixels.
        region_px: side of a region in pixels, 4096 or 2048 in published models.
        spacing_um: µm per pixel of a region.
        token_mask: "tissue" keeps the tokens with tissue, "none" every token of a kept region.

    Returns:
        The grid, whose tiles are the regions.

    Raises:
        SlideError: no region has tissue, or the slide's spacing makes no regions.
    """
    grid = make_grid(info, tissue, tile_px=region_px, token_px=token_px, spacing_um=spacing_um)
    if not grid.kept_tiles:
        raise SlideError(
            f"a slide must show tissue, got no region of {region_px} px with any in {info.path}; look at it with "
            "`maskattn tissue`, or give a mask"
        )
    if token_mask == "none":
        grid = replace(grid, token_keep_THW=np.broadcast_to(np.True_, grid.token_keep_THW.shape))
    return grid


def encode_regions(
    reader: SlideReader,
    grid: TokenGrid,
    model: HIPT,
    *,
    batch_size: int = 64,
    workers: int = 0,
    on_region: Callable[[int, int], None] | None = None,
    take_patches: TakePatches | None = None,
) -> EncodedRegions:
    """Encode the kept regions of a slide, one at a time.

    Args:
        reader: the open slide.
        grid: its regions, from :func:`lay_regions`.
        model: the model on its device, in eval mode.
        batch_size: patches in the patch encoder at a time.
        workers: the number of processes that decode regions in advance; 0 decodes in this process.
        on_region: called with (regions done, regions to do).
        take_patches: called with the features of each region's patches, for example to store them.

    Raises:
        SlideError: no region can be read.
    """
    found: list[Tensor] = []
    rows: list[int] = []
    reason: str | None = None
    for region in encode_patches(reader, grid, model, batch_size=batch_size, workers=workers):
        reason = reason or region.reason
        if region.reason is None:
            with torch.inference_mode():
                found.append(model.region_encoder(model.region_tokens(region.features_PC, region.patches)))
            rows.append(region.row)
            if take_patches is not None:
                take_patches(region.features_NC(), region.row)
        if on_region is not None:
            on_region(region.row + 1, grid.kept_tiles)
    if not found:
        raise SlideError(
            f"a slide must have regions that can be read, got {grid.kept_tiles} of {grid.kept_tiles} unreadable in "
            f"{reader.path}; the first because {reason}"
        )
    keep_HW = np.zeros_like(grid.keep_HW)
    keep_HW[tuple(np.argwhere(grid.keep_HW)[rows].T)] = True
    # Copied outside inference mode: the relevance pass takes gradients with respect to them.
    embeddings_TC = torch.cat(found).clone()
    return EncodedRegions(embeddings_TC, np.array(rows), torch.from_numpy(keep_HW), reason)


def encode_patches(
    reader: SlideReader, grid: TokenGrid, level: PatchLevel, *, batch_size: int = 64, workers: int = 0
) -> Iterator[EncodedPatches]:
    """Yield features of the patches of a slide's regions, one region at a time; arguments as in encode_regions."""
    for row, pixels, keep, why in _read(reader, grid, level, workers=workers):
        with torch.inference_mode():
            patches = level.cut(pixels, keep if why is None else torch.zeros_like(keep))
            yield EncodedPatches(row, level.encode_patches(patches, batch_size), patches, why)


def encode_stored_regions(stored: RegionFeatures, model: RegionModel, *, batch_size: int = 8) -> EncodedRegions:
    """Embed regions from stored features of their patches (``hierarchical_embeddings``).

    Args:
        stored: the features, from :func:`maskattn.slide.layouts.hierarchical.read_regions`.
        model: the model on its device, in eval mode.
        batch_size: regions in the region encoder at a time.

    Returns:
        The embeddings of the regions that have a patch, row-major on the slide; ``rows_T`` are their rows in the file.

    Raises:
        SlideError: no region has a patch with features, or the regions are not on one grid.
        ValueError: the width of the features is not the model's input width.
    """
    rows, columns, keep_HW = grid_cells(stored)
    order = np.lexsort((columns, rows))
    order = order[np.any(stored.keep_TN[order], axis=1)]
    if not len(order):
        raise SlideError(f"a slide must have regions with features, got none in {stored.source}; extract it again")
    weight = next(model.parameters())
    found = []
    for first in range(0, len(order), batch_size):
        taken = order[first : first + batch_size]
        features = torch.from_numpy(np.ascontiguousarray(stored.features_TNC[taken])).to(weight.device, weight.dtype)
        with torch.inference_mode():
            keep = torch.from_numpy(stored.keep_TN[taken]).to(weight.device)
            found.append(model.embed_regions(features, keep)[0])
    keep_HW = np.zeros_like(keep_HW)
    keep_HW[rows[order], columns[order]] = True
    return EncodedRegions(torch.cat(found).clone(), order, torch.from_numpy(keep_HW))


def explain_regions(
    reader: SlideReader,
    grid: TokenGrid,
    model: HIPT,
    encoded: EncodedRegions,
    relevance: RelevanceMap,
    cdam: ThreeLevelCDAM,
    attention: FactorisedAttention,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> Iterator[ExplainedRegion]:
    """Yield the maps of a slide's regions at the resolution of tokens, one region at a time.

    Args:
        reader, grid, model, batch_size, workers: as for :func:`encode_regions`.
        encoded: the result of :func:`encode_regions`.
        relevance: the relevance of the regions, ``cdam.slide(encoded.embeddings_TC, encoded.keep_HW)``.
        cdam: the method of explanation, for this model.
        attention: the factorised attention map, for this model.
    """
    assert relevance.gradient_KTC is not None, "token maps need the gradient"
    slide_T = attention.slide(encoded.embeddings_TC, encoded.keep_HW)
    for row, pixels, keep, why in _read(reader, grid, model, encoded.rows_T, workers):
        index = int(np.searchsorted(encoded.rows_T, row))
        keep_hw = np.ascontiguousarray(grid.token_keep_THW[row])
        if why is not None:  # unreadable the second time: the region has no token map
            keep = torch.zeros(1, *keep_hw.shape, dtype=torch.bool, device=pixels.device)
            keep_hw = np.zeros_like(keep_hw)
        gradient_K1C = relevance.gradient_KTC[:, index : index + 1]
        yield ExplainedRegion(
            index,
            keep_hw,
            cdam.regions(pixels, keep, gradient_K1C, batch_size=batch_size),
            attention.regions(pixels, keep, slide_T[index : index + 1]),
        )


def _read(
    reader: SlideReader, grid: TokenGrid, model: PatchLevel, rows: np.ndarray | None = None, workers: int = 0
) -> Iterator[tuple[int, Tensor, Tensor, str | None]]:
    """Yield for each region its index, pixels (1, 3, Y, X), keep (1, h, w), and why it cannot be read, or None."""
    device = model.pixel_mean.device
    for batch in stream_tiles(reader, grid, batch_size=1, workers=workers, rows=rows):
        if batch.damages is not None:
            reader.damages.merge(batch.damages)
        row = int(batch.rows_B[0])
        keep = torch.from_numpy(np.ascontiguousarray(grid.token_keep_THW[row : row + 1])).to(device)
        why = None if bool(batch.readable_B[0]) else batch.reason or "it is damaged"
        yield row, batch.tiles_BCHW.to(device), keep, why
