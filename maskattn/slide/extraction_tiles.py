"""The tiles of a slide that are encoded, laid over its tissue or read from another tool's file of coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskattn.errors import SlideError
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.slide.extract_request import MIN_TISSUE, ExtractSettings, tile_geometry
from maskattn.slide.layouts import TileHeader, find_coords, read_coords
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text
from maskattn.slide.opened_ahead import tissue_of
from maskattn.slide.reader import SlideReader
from maskattn.slide.region_places import lay_region_patches
from maskattn.slide.slide_run import Stages
from maskattn.slide.tile_places import TilePlaces, lay_tiles, with_tokens
from maskattn.slide.tissue import TissueMask, limit_tissue, load_mask
from maskattn.slide.tissue.bright_field import require_bright_field

__all__ = ["FoundTiles", "coords_file", "find_tiles"]


@dataclass(frozen=True, eq=False)
class FoundTiles:
    """The tiles of a slide and the metadata that they share.

    Attributes:
        places: the tiles' positions, and which of their tokens show tissue.
        header: the metadata for the feature file.
        tissue: the tissue mask; None if tissue was not segmented.
    """

    places: TilePlaces
    header: TileHeader
    tissue: TissueMask | None

    def describe_tissue(self) -> dict[str, Any] | None:
        """Return method, fraction and notes of the tissue mask, as records state them."""
        if self.tissue is None:
            return None
        fraction, notes = float(self.tissue.tissue_fraction), list(self.tissue.notes)
        return {"method": self.tissue.method, "fraction": fraction, "notes": notes}


def find_tiles(
    job: SlideJob, reader: SlideReader, encoder: TileEncoder, settings: ExtractSettings, stages: Stages
) -> FoundTiles:
    """Find the tiles to encode.

    Args:
        job: the slide.
        reader: the open slide.
        encoder: the encoder of the tiles.
        settings: the request.
        stages: the clock, which times the stages "tissue" and "tiles".

    Raises:
        SlideError: there is no tissue, the coordinates cannot be used, or the slide cannot be read.
    """
    tissue = None
    with stages("tissue"):
        if settings.finds_tissue:
            roi, exclude = (settings.roi, settings.roi_classes), (settings.exclude, settings.exclude_classes)
            tissue = limit_tissue(_tissue_of(job, reader, settings), reader.info, job.slide_id, roi, exclude)
        elif not settings.force:
            require_bright_field(reader)
    with stages("tiles"):
        if settings.coords_dir is None:
            assert tissue is not None, "without coordinates tissue is segmented"
            places, header = _laid(job, reader, encoder, settings, tissue)
        else:
            places, header = _given(job, reader, encoder, settings)
        if settings.token_mask == "tissue":
            assert tissue is not None, "for masked tokens tissue is segmented"
            places = with_tokens(places, tissue, encoder.token_px)
    return FoundTiles(places, header, tissue)


def coords_file(job: SlideJob, folder: Path) -> Path:
    """Find the file of a slide's coordinates below a folder.

    Raises:
        SlideError: there is no such file, or there are several.
    """
    source = find_coords(folder, job.slide_id)
    if source is None:
        raise SlideError(
            f"a slide must have a file of coordinates, got none for {job.slide_id!r} below {as_text(folder)}; check "
            "the ids, or leave --coords out"
        )
    return source


def _tissue_of(job: SlideJob, reader: SlideReader, settings: ExtractSettings) -> TissueMask:
    if job.mask_path is None:
        return tissue_of(reader, settings.ink, settings.force)
    if not settings.force:
        require_bright_field(reader)
    classes = settings.mask_classes
    return load_mask(job.mask_path, reader.info, settings.mask_values, tissue_classes=classes, reader=reader)


def _laid(
    job: SlideJob, reader: SlideReader, encoder: TileEncoder, settings: ExtractSettings, tissue: TissueMask
) -> tuple[TilePlaces, TileHeader]:
    """Lay tiles on a lattice over the tissue."""
    info = reader.info
    patch_px, overlap_px, spacing_um = tile_geometry(settings, encoder)
    if settings.region_px is not None:
        places = lay_region_patches(
            info,
            tissue,
            patch_px=patch_px,
            side=settings.region_px // patch_px,
            spacing_um=spacing_um,
            tile_px=encoder.tile_px,
            min_tissue=settings.min_tissue or 0.0,
            token_mask=settings.token_mask,
        )
    else:
        places = lay_tiles(
            info,
            tissue,
            patch_px=patch_px,
            overlap_px=overlap_px,
            spacing_um=spacing_um,
            tile_px=encoder.tile_px,
            min_tissue=MIN_TISSUE if settings.min_tissue is None else settings.min_tissue,
        )
    if not places.kept_tiles:
        notes = f" ({'; '.join(tissue.notes)})" if tissue.notes else ""
        what = f"too little for a tile of {patch_px} px" if tissue.mask_HW.any() else "none"
        raise SlideError(
            f"a slide must show tissue, got {what} by {tissue.method} in {job.path}{notes}; look at it with `maskattn "
            "tissue`, and lower --min-tissue or give a mask of the tissue (--mask)"
        )
    header = _header(job, reader, encoder, settings, patch_px, places.tile_lv0, spacing_um, overlap_px)
    return places, header


def _given(
    job: SlideJob, reader: SlideReader, encoder: TileEncoder, settings: ExtractSettings
) -> tuple[TilePlaces, TileHeader]:
    """Read the tiles from a file of coordinates."""
    assert settings.coords_dir is not None, "called only with coordinates"
    info = reader.info
    source = coords_file(job, settings.coords_dir)
    tiles = read_coords(source, slide=info, named=(job.slide_id, job.path.stem))
    if tiles.patch_size_lv0 is None or tiles.patch_size_px is None or tiles.spacing_um is None:
        raise SlideError(
            f"coordinates must state the size and the spacing of tiles, got none in {as_text(source)}; write them with "
            "a tool that states both, or leave --coords out"
        )
    if not len(tiles.coords_T2):
        raise SlideError(f"a slide must have tiles, got no coordinates in {as_text(source)}; leave the slide out")
    places = TilePlaces(tiles.coords_T2, tiles.patch_size_lv0, encoder.tile_px, len(tiles.coords_T2))
    header = _header(
        job,
        reader,
        encoder,
        settings,
        tiles.patch_size_px,
        tiles.patch_size_lv0,
        tiles.spacing_um,
        tiles.overlap_px,
    )
    return places, header


def _header(
    job: SlideJob,
    reader: SlideReader,
    encoder: TileEncoder,
    settings: ExtractSettings,
    patch_px: int,
    tile_lv0: int,
    spacing_um: float,
    overlap_px: int,
) -> TileHeader:
    info = reader.info
    return TileHeader(
        slide_id=job.slide_id,
        patch_size_px=patch_px,
        patch_size_lv0=tile_lv0,
        spacing_um=spacing_um,
        overlap_px=overlap_px,
        width_px=info.width_px,
        height_px=info.height_px,
        spacing_lv0_um=info.spacing_um,
        magnification=info.objective_power,
        encoder=encoder.name,
        token_mask=settings.token_mask,
        slide_path=job.location,
    )
