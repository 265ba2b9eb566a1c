"""The tiles of a slide in a run: those of the model's grid, those laid over the tissue, or those of given features.

Dimension key: T tiles, C channels, H·W cells of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError, quoted
from maskattn.nn.slide_model import SlideModelConfig
from maskattn.nn.slide_models.card import EncoderFacts, ModelCard, mismatches
from maskattn.nn.slide_models.head import TileGrid
from maskattn.shapes import Float, Int
from maskattn.slide.extract_request import MIN_TISSUE
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.layouts import TileFeatures, TileHeader, find_features, in_reading_order, read_features
from maskattn.slide.names import as_text
from maskattn.slide.opened_ahead import tissue_of
from maskattn.slide.request import finds_tissue
from maskattn.slide.slide_run import SlideRun
from maskattn.slide.stored_regions import StoredRegions, read_stored_regions, regions_file
from maskattn.slide.tile_places import TilePlaces, lay_tiles, with_tokens
from maskattn.slide.tissue import TissueMask, limit_tissue, load_mask
from maskattn.slide.tissue.bright_field import require_bright_field

__all__ = ["RunTiles", "find_run_tiles", "shifted_tiles"]


@dataclass(frozen=True, eq=False)
class RunTiles:
    """The tiles of a slide in a run.

    Attributes:
        grid: the positions of the tiles, row-major, and their tokens.
        header: the metadata that all tiles share, for output files.
        tissue: the tissue mask; None if tissue was not segmented.
        on_lattice: whether the grid's cells are the tiles' positions; False if given tiles are not on a lattice.
        um_per_px: µm per pixel of the coordinates; None if it is not known.
        features: the given features; None if the tiles are encoded.
        stored: regions with given features of their patches; None if tiles are encoded, or have features themselves.
    """

    grid: TokenGrid
    header: TileHeader
    tissue: TissueMask | None = None
    on_lattice: bool = True
    um_per_px: float | None = None
    features: TileFeatures | None = None
    stored: StoredRegions | None = None

    def places(self, rows_T: Int[np.ndarray, " T"]) -> tuple[Float[Tensor, "T 2"] | None, TileGrid | None]:
        """Return the positions of some tiles for a slide head: (T, 2) x, y in µm, and cells; None if not known."""
        coords_um = None
        if self.um_per_px is not None:
            coords_um = torch.from_numpy(self.grid.coords_lv0[rows_T] * self.um_per_px).float()
        if not self.on_lattice:
            return coords_um, None
        keep_HW = self.grid.keep_HW
        cells_T2 = torch.from_numpy(np.argwhere(keep_HW)[rows_T])
        return coords_um, TileGrid(cells_T2[:, 0], cells_T2[:, 1], (keep_HW.shape[0], keep_HW.shape[1]))


def find_run_tiles(run: SlideRun) -> RunTiles:
    """Find the tiles of a slide.

    Raises:
        SlideError: there is no tissue, or the given features cannot be used.
    """
    if run.settings.features_dir is not None:
        return _given(run)
    with run.stages("tissue"):
        tissue = _limited(run, _find_or_load_tissue(run))
    with run.stages("grid"):
        config = run.model.config
        if isinstance(config, SlideModelConfig):
            grid = _own_grid(run, config, tissue)
            header = TileHeader.of_grid(run.job.slide_id, run.info, grid)
        else:
            grid, header = _laid(run, config, tissue)
    return RunTiles(grid, header, tissue, True, run.info.spacing_um)


def shifted_tiles(run: SlideRun, tiles: RunTiles, before: tuple[int, int]) -> RunTiles | None:
    """Return the tiles of another tiling of the same tissue; None if none of them has enough tissue.

    Args:
        run: the slide's run.
        tiles: the tiling that starts at the slide's corner.
        before: (x, y), the number of tokens, fewer than along a tile, by which the other tiling starts before the
            slide's corner.
    """
    config = run.model.config
    with run.stages("grid"):
        if isinstance(config, SlideModelConfig):
            grid = _own_grid(run, config, tiles.tissue, before)
            return replace(tiles, grid=grid)
        try:
            grid, header = _laid(run, config, tiles.tissue, before)
        except SlideError:  # too little tissue in every tile; other causes would have failed the first tiling
            return None
    return replace(tiles, grid=grid, header=header)


def _find_or_load_tissue(run: SlideRun) -> TissueMask | None:
    """Return the tissue mask, or None if the run attends to the whole slide."""
    settings, model_masked = run.settings, run.model.leaves_out
    if finds_tissue(run.job, settings, model_masked):
        return tissue_of(run.reader, settings.ink, settings.force)
    if not settings.force:
        require_bright_field(run.reader)
    if run.job.mask_path is None or not (settings.masked and model_masked):
        return None
    classes = settings.mask_classes
    return load_mask(run.job.mask_path, run.info, settings.mask_values, tissue_classes=classes, reader=run.reader)


def _limited(run: SlideRun, tissue: TissueMask | None) -> TissueMask | None:
    """Restrict the tissue to the region of interest, without excluded areas."""
    if tissue is None:
        return None
    settings = run.settings
    roi, exclude = (settings.roi, settings.roi_classes), (settings.exclude, settings.exclude_classes)
    return limit_tissue(tissue, run.info, run.job.slide_id, roi, exclude)


def _own_grid(
    run: SlideRun, config: SlideModelConfig, tissue: TissueMask | None, before: tuple[int, int] = (0, 0)
) -> TokenGrid:
    """Lay the grid of a model that reads tissue tokens; a tile with at least one of them is kept."""
    grid = make_grid(
        run.info,
        tissue,
        tile_px=config.tile_px,
        token_px=config.token_px,
        spacing_um=config.spacing_um,
        min_token_fraction=config.min_token_fraction,
        masked=tissue is not None,
        before=before,
    )
    if tissue is not None and grid.kept_tiles == 0:
        raise SlideError(_without_tissue(run, tissue, f"a token of {config.token_px * config.spacing_um:g} µm"))
    return grid


def _laid(
    run: SlideRun, card: ModelCard, tissue: TissueMask | None, before: tuple[int, int] = (0, 0)
) -> tuple[TokenGrid, TileHeader]:
    """Lay tiles over the tissue as ``maskattn extract`` does."""
    assert card.tile_px is not None, "the card of a model with an encoder states its tiles"
    assert card.patch_px is not None, "the card of a model with an encoder states its tiles"
    assert card.spacing_um is not None, "a run without a spacing is refused before it begins"
    info, token_px = run.info, run.model.token_px
    spacing_um = card.spacing_um * card.patch_px / card.tile_px  # of the image that the encoder sees
    if tissue is None:
        grid = make_grid(
            info, None, tile_px=card.tile_px, token_px=token_px, spacing_um=spacing_um, masked=False, before=before
        )
    else:
        tile_lv0 = round(card.patch_px * card.spacing_um / info.spacing_um)
        token_lv0 = tile_lv0 * token_px / card.tile_px
        before_lv0 = round(before[0] * token_lv0), round(before[1] * token_lv0)
        least = None if run.model.encoder is None else run.model.encoder.min_tissue
        places = lay_tiles(
            info,
            tissue,
            patch_px=card.patch_px,
            overlap_px=0,
            spacing_um=card.spacing_um,
            tile_px=card.tile_px,
            min_tissue=MIN_TISSUE if least is None else least,
            before_lv0=before_lv0,
        )
        if not places.kept_tiles:
            raise SlideError(_without_tissue(run, tissue, f"a tile of {card.patch_px * card.spacing_um:g} µm"))
        if card.token_mask == "tissue":
            places = with_tokens(places, tissue, token_px)
        cells_T2 = (places.coords_lv0[:, ::-1] + before_lv0[::-1]) // places.tile_lv0
        keep_HW = np.zeros(cells_T2.max(axis=0) + 1, bool)
        keep_HW[tuple(cells_T2.T)] = True
        grid = _as_grid(run, places, keep_HW, spacing_um)
    header = TileHeader(
        slide_id=run.job.slide_id,
        patch_size_px=card.patch_px,
        patch_size_lv0=grid.tile_lv0,
        spacing_um=card.spacing_um,
        width_px=info.width_px,
        height_px=info.height_px,
        spacing_lv0_um=info.spacing_um,
        magnification=info.objective_power,
        slide_path=run.job.location,
    )
    return grid, header


def _as_grid(run: SlideRun, places: TilePlaces, keep_HW: np.ndarray, spacing_um: float) -> TokenGrid:
    token_px = run.model.token_px if places.tile_px % run.model.token_px == 0 else places.tile_px
    side = places.tile_px // token_px
    keep_Thw = places.token_keep_THW
    if keep_Thw is None:
        keep_Thw = np.ones((places.kept_tiles, side, side), bool)
    size = (0, 0) if run.alone else (run.info.width_px, run.info.height_px)
    return TokenGrid(keep_HW, places.coords_lv0, keep_Thw, places.tile_px, token_px, spacing_um, places.tile_lv0, *size)


def _given(run: SlideRun) -> RunTiles:
    """Read the tiles and their features."""
    job, folder, card = run.job, run.settings.features_dir, run.model.card
    assert folder is not None, "called only with features"
    with run.stages("features"):
        named = (job.slide_id, job.path.stem)
        regions = regions_file(run.model, folder, job.slide_id, job.path if run.alone else None)
        if regions is not None:
            stored = read_stored_regions(regions, run.model, None if run.alone else run.info, named)
            return _of_stored(run, stored)
        source: Path | None = job.path if run.alone else find_features(folder, job.slide_id)
        if source is None:
            raise SlideError(
                f"a slide must have a file of features, got none for {job.slide_id!r} below {as_text(folder)}; check "
                "the ids, or leave --features out"
            )
        tiles = read_features(source, slide=None if run.alone else run.info, named=named)
    _check_features(run, tiles)
    if tiles.patch_size_lv0 is None:
        raise SlideError(
            f"features must state the size of their tiles, got none in {as_text(source)}; write them with a tool that "
            "states it, or extract them again"
        )
    sorted_tiles, cells_HW = in_reading_order(tiles, run.model.head.reads_grid)
    on_lattice = cells_HW is not None
    keep_HW = np.ones((1, len(tiles.coords_T2)), bool) if cells_HW is None else cells_HW
    tissue = None
    places = TilePlaces(
        sorted_tiles.coords_T2, tiles.patch_size_lv0, card.tile_px or tiles.patch_size_px or 1, keep_HW.size
    )
    if run.settings.tokens and card.token_mask == "tissue" and not run.alone:
        with run.stages("tissue"):
            tissue = _limited(run, _find_or_load_tissue(run))
        if tissue is not None:
            places = with_tokens(places, tissue, run.model.token_px)
    grid = _as_grid(run, places, keep_HW, tiles.spacing_um or 0.0)
    um = tiles.spacing_lv0_um if run.alone else run.info.spacing_um
    if not tiles.on_level0 and tiles.spacing_um is not None:
        um = tiles.spacing_um
    return RunTiles(grid, sorted_tiles, tissue, on_lattice, um, sorted_tiles)


def _of_stored(run: SlideRun, stored: StoredRegions) -> RunTiles:
    """Return regions as tiles; their tokens are patches, or if pixels are read the patch encoder's tokens."""
    regions, card = stored.regions, run.model.card
    _check_features(run, regions)
    region_px, tissue, um = regions.patch_size_px, None, regions.spacing_lv0_um
    assert region_px is not None, "hs2p states the side of its tiles"
    assert regions.patch_size_lv0 is not None, "hs2p states the side of its tiles"
    if not run.alone:
        um = run.info.spacing_um
    if not run.with_tokens:
        run.has_patches = run.settings.tokens
        grid = TokenGrid(
            stored.keep_HW,
            regions.coords_T2,
            stored.keep_Tnn(),
            region_px,
            region_px // stored.side,
            regions.spacing_um or 0.0,
            regions.patch_size_lv0,
            *((0, 0) if run.alone else (run.info.width_px, run.info.height_px)),
        )
        return RunTiles(grid, regions, None, True, um, regions, stored)
    if card.tile_px != region_px:
        raise SlideError(
            f"regions must have the side with which their features were extracted, got {card.tile_px} px requested and "
            f"{region_px} px in {as_text(regions.source)}; give --patch-size {region_px}"
        )
    places = TilePlaces(regions.coords_T2, regions.patch_size_lv0, region_px, stored.keep_HW.size)
    if card.token_mask == "tissue":
        with run.stages("tissue"):
            tissue = _limited(run, _find_or_load_tissue(run))
        if tissue is not None:
            places = with_tokens(places, tissue, run.model.token_px)
    grid = _as_grid(run, places, stored.keep_HW, regions.spacing_um or 0.0)
    return RunTiles(grid, regions, tissue, True, um, regions, stored)


def _check_features(run: SlideRun, tiles: TileFeatures) -> None:
    """Refuse features that differ from those that the model was trained with.

    Raises:
        SlideError: the features differ from the model's card; the message lists how.
    """
    head, card, where = run.model.head, run.model.card, as_text(tiles.source)
    if not len(tiles.features_TC):
        raise SlideError(f"a slide must have tiles, got no features in {where}; leave the slide out")
    if tiles.features_TC.shape[1] != head.in_dim:
        raise SlideError(
            f"features must have the slide model's input width, got {tiles.features_TC.shape[1]} channels in {where} "
            f"and {head.in_dim} for {card.name}; use the encoder that it was trained with"
        )
    found = ModelCard(
        name=card.name,
        kind=card.kind,
        classes=card.classes,
        encoder=None if tiles.encoder is None else EncoderFacts(tiles.encoder, tiles.features_TC.shape[1]),
        spacing_um=tiles.spacing_um,
        patch_px=tiles.patch_size_px,
        token_mask=tiles.token_mask,
    )
    wrong = mismatches(card, found)
    if wrong and not run.settings.other_encoder:
        raise SlideError(
            f"a slide model must be run as it was trained, got {'; '.join(wrong)} in {where} for {card.name}; give "
            "features like those of its training, or go on with --other-encoder"
        )


def _without_tissue(run: SlideRun, tissue: TissueMask, filled: str) -> str:
    """Return the error message for a slide without kept tiles; the remedy depends on whether a mask was given."""
    mask_path = run.job.mask_path
    notes = f" ({'; '.join(tissue.notes)})" if tissue.notes else ""
    if mask_path is None:
        by, given = tissue.method, ""
        remedy = "if there is tissue, give a mask of it (--mask, or mask_path in a manifest)"
    else:
        by, given = f"the mask {mask_path}", f" --mask {quoted(mask_path)}"
        remedy = "correct the mask, or name the labels or classes that mean tissue (--mask-value, --mask-class)"
    what = f"none by {by} in {run.job.path}{notes}"
    if tissue.mask_HW.any():
        what = f"too little by {by} in {run.job.path} to fill {filled}{notes}"
    return (
        f"a slide must show tissue, got {what}; look at it with `maskattn tissue {quoted(run.job.path)}{given}` and "
        f"{remedy}"
    )
