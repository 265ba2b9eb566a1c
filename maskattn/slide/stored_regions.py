"""Regions of a slide from the stored features of their patches: their embeddings, and which patches took part.

Pixels are not needed for the scores, nor for maps of regions and of their patches; maps of tokens need them.

Dimension key: T regions, N = n·n patches of a region, C channels, B regions of a batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.nn.encoders.regions import name_in_regions
from maskattn.nn.region_model import RegionModel
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.nn.slide_models.two_stage import TwoStageModel
from maskattn.shapes import Bool, Float
from maskattn.slide.layouts import TileFeatures
from maskattn.slide.layouts.hierarchical import find_regions, read_regions
from maskattn.slide.names import as_text
from maskattn.slide.reader import SlideInfo
from maskattn.slide.regions import encode_stored_regions

__all__ = ["StoredRegions", "read_stored_regions", "regions_file"]


@dataclass(frozen=True, eq=False)
class StoredRegions:
    """The regions of a slide that have a patch with features, row-major on the slide.

    Attributes:
        regions: their header, coordinates and embeddings (T, C).
        keep_HW: (H, W) bool, which of the slide's regions they are.
        features_TNC: of their patches.
        keep_TN: (T, N) bool, the patches that have features.
    """

    regions: TileFeatures
    keep_HW: Bool[np.ndarray, "H W"]
    features_TNC: Float[np.ndarray, "T N C"]
    keep_TN: Bool[np.ndarray, "T N"]

    @property
    def side(self) -> int:
        """Patches along a region."""
        return math.isqrt(self.keep_TN.shape[1])

    def keep_Tnn(self) -> Bool[np.ndarray, "T n n"]:  # noqa: N802 (the dimension key)
        """The patches that have features, in their places."""
        return self.keep_TN.reshape(len(self.keep_TN), self.side, self.side)

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Indices (B,), features (B, N, C) and kept patches (B, N), some regions at a time."""
        for first in range(0, len(self.keep_TN), size):
            some = np.arange(first, min(first + size, len(self.keep_TN)))
            features = torch.from_numpy(np.ascontiguousarray(self.features_TNC[some])).to(device, torch.float32)
            yield some, features, torch.from_numpy(self.keep_TN[some]).to(device)


def regions_file(model: TwoStageModel, folder: Path, slide_id: str, given: Path | None) -> Path | None:
    """The file of a slide's stored regions, where there is one that the model is to read.

    Args:
        model: what reads them.
        folder: of features, as the user named it.
        slide_id: the slide's.
        given: the slide's file of features, where that is all there is of it.

    Raises:
        SlideError: there is one, no features of tiles beside it, and the model has no region level.
    """
    source = find_regions(folder, slide_id)
    if source is None or model.region_level is not None:
        return source
    if given in (None, source):
        raise SlideError(
            f"features of regions' patches need a model with a region level (vit_region), got {model.card.name} "
            f"({model.head.kind}) for {as_text(source)}; give such a model, or features of tiles"
        )
    return None


def read_stored_regions(
    source: Path, model: TwoStageModel, slide: SlideInfo | None, named: tuple[str, ...]
) -> StoredRegions:
    """Read a slide's regions and embed them.

    Args:
        source: ``hierarchical_embeddings/<id>.pt``.
        model: with a region level and HIPT's slide level.
        slide: which they are held against; None where it is not given.
        named: the names that the slide goes by.

    Raises:
        SlideError: the file cannot be used, or the patches have another width than the model reads.
    """
    stored = read_regions(source, slide=slide, named=named)
    level, head = model.region_level, model.head
    assert level is not None, "the file is sought for a model with a region level"
    assert isinstance(head, HIPTHead), "a region level comes with HIPT's slide level"
    width = level.patch_embed.in_chans
    if stored.features_TNC.shape[2] != width:
        raise SlideError(
            f"features of patches must be as wide as the region level reads, got {stored.features_TNC.shape[2]} "
            f"channels in {as_text(source)} and {width} for {model.card.name}; take the encoder of patches that it was "
            "trained with"
        )
    encoded = encode_stored_regions(stored, RegionModel(level, head).eval())
    order, header = encoded.rows_T, {name: getattr(stored, name) for name in stored.__dataclass_fields__}
    for name in ("features_TNC", "keep_TN"):
        del header[name]
    header["coords_T2"] = stored.coords_T2[order]
    if stored.encoder is not None and stored.patch_size_px is not None:
        header["encoder"] = name_in_regions(stored.encoder, stored.patch_size_px)
    regions = TileFeatures(**header, features_TC=encoded.embeddings_TC.float().cpu().numpy())
    return StoredRegions(regions, encoded.keep_HW.numpy(), stored.features_TNC[order], stored.keep_TN[order])
