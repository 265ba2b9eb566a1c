"""Regions of a slide from stored features of their patches: the regions' embeddings and their kept patches.

Scores, and maps of regions and their patches, need no pixels; token maps do.

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
        regions: header, coordinates and embeddings (T, C) of the regions.
        keep_HW: (H, W) bool, True for the slide's regions that are stored.
        features_TNC: (T, N, C) features of the patches.
        keep_TN: (T, N) bool, True for patches that have features.
    """

    regions: TileFeatures
    keep_HW: Bool[np.ndarray, "H W"]
    features_TNC: Float[np.ndarray, "T N C"]
    keep_TN: Bool[np.ndarray, "T N"]

    @property
    def side(self) -> int:
        """The number of patches along a side of a region."""
        return math.isqrt(self.keep_TN.shape[1])

    def keep_Tnn(self) -> Bool[np.ndarray, "T n n"]:  # noqa: N802 (the dimension key)
        """Return ``keep_TN`` as (T, n, n), with the patches in their positions."""
        return self.keep_TN.reshape(len(self.keep_TN), self.side, self.side)

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Yield batches of regions: indices (B,), features (B, N, C) and kept patches (B, N)."""
        for first in range(0, len(self.keep_TN), size):
            rows_B = np.arange(first, min(first + size, len(self.keep_TN)))
            features = torch.from_numpy(np.ascontiguousarray(self.features_TNC[rows_B])).to(device, torch.float32)
            yield rows_B, features, torch.from_numpy(self.keep_TN[rows_B]).to(device)


def regions_file(model: TwoStageModel, folder: Path, slide_id: str, given: Path | None) -> Path | None:
    """Return the file of a slide's stored regions; None if there is none, or the model reads features of tiles.

    Args:
        model: the model that reads the features.
        folder: the folder of features.
        slide_id: the slide's id.
        given: the slide's feature file, if only that is given and not the slide.

    Raises:
        SlideError: the slide has stored regions that the model without a region level cannot read.
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
        model: a model with a region level and HIPT's slide level.
        slide: the slide, with which the regions must agree; None if it is not given.
        named: accepted names of the slide.

    Raises:
        SlideError: the file cannot be used, or the width of its features is not the model's input width.
    """
    stored = read_regions(source, slide=slide, named=named)
    level, head = model.region_level, model.head
    assert level is not None, "only a model with a region level reads such a file"
    assert isinstance(head, HIPTHead), "a region level comes with HIPT's slide level"
    width = level.patch_embed.in_chans
    if stored.features_TNC.shape[2] != width:
        raise SlideError(
            f"features of patches must have the region level's input width, got {stored.features_TNC.shape[2]} "
            f"channels in {as_text(source)} and {width} for {model.card.name}; use the encoder of patches that it was "
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
