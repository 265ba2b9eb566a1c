"""The request for an extraction of features; see ``asked.py`` for the metadata of its fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskattn.errors import ManifestError
from maskattn.slide.asked import asked, recorded_fields
from maskattn.slide.batch_sizes import check_batches, check_tokens_of
from maskattn.slide.outlines.rules import check_areas
from maskattn.slide.shared_requests import SharedSettings, slide_spacing

if TYPE_CHECKING:
    from maskattn.nn.encoders.tile_encoder import TileEncoder
    from maskattn.slide.manifest import SlideJob

__all__ = ["ExtractSettings", "MIN_TISSUE", "check_extraction", "recorded_extraction", "tile_geometry"]

MIN_TISSUE = 0.1

_TOKEN_MASK_HELP = (
    "none: every token of a kept tile takes part, as when the encoder was trained. tissue: background tokens are left "
    "out, which is faster and changes the features of partly covered tiles (cosine similarity for a CLIP encoder: 0.95 "
    "with a half to three quarters of tissue, 0.37 below a quarter; see docs/extract.md)."
)


@dataclass(frozen=True)
class ExtractSettings(SharedSettings):
    """How features are extracted, in addition to :class:`SharedSettings`.

    Attributes:
        out_dir: the folder in which the layout's folders are created.
        layout: the tool whose folders and file format the features are written in.
        token_mask: "none" = every token of a kept tile takes part; "tissue" = background tokens are left out.
        magnification: the magnification of the tiles, 10 for 1 µm per pixel; None = see ``target_spacing_um``.
        target_spacing_um: µm per pixel of the tiles; None = from ``magnification``, or else the encoder's.
        patch_px: side of a tile in pixels at that spacing, as cut from the slide; None = the encoder's.
        overlap_px: overlap of neighbouring tiles in those pixels.
        min_tissue: the smallest fraction of a kept tile's area that is tissue, 0 to 1; None = 0.1, or any in regions.
            Tiles from ``coords_dir`` are all kept.
        coords_dir: a folder of tile coordinates that another tool wrote; None = lay tiles over the tissue.
        dtype: the encoder's compute dtype; other dtypes than float32 use autocast.
        slide_spacing_um: µm per level-0 pixel of every slide; overrides manifest and metadata.
        overwrite: extract finished slides again.
        region_px: side of a region in pixels of its patches, which are the tiles and are stored region by region;
            None = tiles without regions.
    """

    out_dir: Path = field(
        metadata=asked("--out", "Folder of features; created if it does not exist.", recorded=False, serves=None)
    )
    _: KW_ONLY
    layout: Literal["trident", "clam", "stamp", "slide2vec"] = field(
        default="trident", metadata=asked("--layout", "Output layout: trident, clam, stamp or slide2vec.")
    )
    token_mask: Literal["none", "tissue"] = field(default="none", metadata=asked("--token-mask", _TOKEN_MASK_HELP))
    magnification: float | None = field(
        default=None,
        # Recorded as the spacing that it stands for.
        metadata=asked("--mag", "Magnification of the tiles; 20 means 0.5 µm per pixel.", recorded=False, serves=None),
    )
    target_spacing_um: float | None = field(
        default=None, metadata=asked("--spacing-um", "µm per pixel of the tiles; by default the encoder's.")
    )
    patch_px: int | None = field(
        default=None,
        metadata=asked(
            "--patch-size", "Side of a tile in px at that spacing; by default the encoder's.", minimum=8, maximum=16384
        ),
    )
    overlap_px: int = field(
        default=0, metadata=asked("--overlap", "Overlap of neighbouring tiles in those px.", minimum=0, maximum=16383)
    )
    min_tissue: float | None = field(
        default=None,
        metadata=asked(
            "--min-tissue",
            f"Smallest tissue fraction of a kept tile; by default {MIN_TISSUE:g}, 0 keeps any tissue.",
            minimum=0,
            maximum=1,
        ),
    )
    coords_dir: Path | None = field(
        default=None,
        metadata=asked(
            "--coords", "Folder of tile coordinates from TRIDENT, CLAM, hs2p or AtlasPatch, instead of laying tiles."
        ),
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata=asked("--dtype", "The encoder's compute dtype; float16 features are stored as such."),
    )
    slide_spacing_um: float | None = field(default=None, metadata=slide_spacing("--slide-spacing-um"))
    overwrite: bool = field(
        default=False, metadata=asked("--overwrite", "Extract finished slides again.", recorded=False, serves=None)
    )

    region_px: int | None = field(
        default=None,
        metadata=asked(
            "--region-size",
            "Side of a region in px at that spacing (HIPT: 4096 or 2048); patches are stored region by region.",
            minimum=16,
            maximum=65536,
        ),
    )

    @property
    def finds_tissue(self) -> bool:
        """Whether tissue is segmented; not needed if tiles are given and all of their tokens take part."""
        return self.coords_dir is None or self.token_mask == "tissue"


def check_extraction(jobs: Sequence[SlideJob], settings: ExtractSettings, encoder: TileEncoder | None = None) -> None:
    """Refuse settings that contradict each other or would have no effect.

    Args:
        jobs: the slides.
        settings: the request.
        encoder: the tile encoder; None if it is not loaded yet, which skips the checks that need it.

    Raises:
        ManifestError: settings contradict each other, or one would have no effect.
    """
    if settings.magnification is not None and settings.target_spacing_um is not None:
        raise ManifestError(
            f"tiles have one spacing, got --mag {settings.magnification:g} and --spacing-um "
            f"{settings.target_spacing_um:g}; give one of the two"
        )
    spacing_um = settings.target_spacing_um or (10 / settings.magnification if settings.magnification else None)
    if (spacing_um is not None and not 0.02 <= spacing_um <= 40) or settings.magnification == 0:
        raise ManifestError(
            f"tiles have 0.02 to 40 µm per pixel, got {spacing_um or 0:g}; --mag 20 or --spacing-um 0.5 is usual"
        )
    check_batches(settings)
    _check_coords(settings)
    _check_masks(jobs, settings)
    _check_regions(settings)
    if encoder is None:
        return
    check_tokens_of(settings, encoder)
    if settings.coords_dir is None:
        tile_geometry(settings, encoder)
    if settings.token_mask == "tissue" and encoder.vit is None:
        raise ManifestError(
            f"--token-mask tissue needs a packed vision transformer, got {encoder.name}: {encoder.why_not}; leave it "
            "out"
        )


def tile_geometry(settings: ExtractSettings, encoder: TileEncoder) -> tuple[int, int, float]:
    """Return side and overlap of the tiles in px, and their µm per px, from the request or else the encoder.

    Raises:
        ManifestError: neither the request nor the encoder gives a spacing, the overlap is as large as a tile, or
            patches do not divide the region.
    """
    patch_px = settings.patch_px or encoder.patch_px
    given = 10 / settings.magnification if settings.magnification else settings.target_spacing_um
    spacing_um = given or encoder.spacing_um
    if spacing_um is None:
        raise ManifestError(
            f"tiles must have a spacing, got none, and the spacing at which {encoder.name} was trained is unknown; "
            "give --mag 20 or --spacing-um 0.5, or what suits your slides"
        )
    if settings.overlap_px >= patch_px:
        raise ManifestError(
            f"tiles must overlap by less than their side, got --overlap {settings.overlap_px} of {patch_px} px; make "
            "it smaller"
        )
    if settings.region_px is not None and (settings.region_px % patch_px or settings.region_px < 2 * patch_px):
        raise ManifestError(
            f"a region's side must be two or more whole patches, got --region-size {settings.region_px} with patches "
            f"of {patch_px} px; use {max(2, round(settings.region_px / patch_px)) * patch_px}, or another --patch-size"
        )
    return patch_px, settings.overlap_px, spacing_um


def recorded_extraction(job: SlideJob, settings: ExtractSettings, encoder: TileEncoder) -> dict[str, Any]:
    """Return the request as it is recorded for a slide: defaults are filled in, and inputs without effect left out."""
    record = recorded_fields(settings) | {"tile_px": encoder.tile_px, "mask": None}
    record["coords_dir"] = None if settings.coords_dir is None else str(settings.coords_dir.resolve())
    if settings.coords_dir is None:
        record["patch_px"], record["overlap_px"], record["target_spacing_um"] = tile_geometry(settings, encoder)
        least = MIN_TISSUE if settings.region_px is None else 0.0
        record["min_tissue"] = least if settings.min_tissue is None else settings.min_tissue
    if settings.finds_tissue:
        record["mask"] = None if job.mask_path is None else job.mask_path.name
        record["ink"] = settings.ink if job.mask_path is None else "auto"
    for name in ("mask_values", "mask_classes"):
        labels = getattr(settings, name) if record["mask"] is not None else None
        record[name] = None if labels is None else list(labels)
    return record


def _check_coords(settings: ExtractSettings) -> None:
    if settings.coords_dir is None:
        return
    given = {
        "--mag": settings.magnification,
        "--spacing-um": settings.target_spacing_um,
        "--patch-size": settings.patch_px,
        "--overlap": settings.overlap_px or None,
        "--min-tissue": settings.min_tissue,
    }
    conflicting = [f"{flag} {value:g}" for flag, value in given.items() if value is not None]
    if conflicting:
        raise ManifestError(
            f"coordinates determine the positions and the size of tiles, got {', '.join(conflicting)} with --coords "
            f"{settings.coords_dir}; leave one of them out"
        )
    if not settings.coords_dir.is_dir():
        raise ManifestError(f"--coords must be a folder, got {settings.coords_dir}; name the folder of coordinates")


def _check_regions(settings: ExtractSettings) -> None:
    if settings.region_px is None:
        return
    if settings.layout != "slide2vec":
        raise ManifestError(
            f"features of regions need slide2vec's layout, got --layout {settings.layout} with --region-size "
            f"{settings.region_px}; give --layout slide2vec, or leave --region-size out"
        )
    given = {"--overlap": settings.overlap_px or None, "--coords": settings.coords_dir}
    conflicting = [f"{flag} {value}" for flag, value in given.items() if value is not None]
    if conflicting:
        raise ManifestError(
            f"patches of regions are adjacent and start at the slide's corner, got {', '.join(conflicting)} with "
            f"--region-size {settings.region_px}; leave one of them out"
        )


def _check_masks(jobs: Sequence[SlideJob], settings: ExtractSettings) -> None:
    given = [job for job in jobs if job.mask_path is not None]
    if given and not settings.finds_tissue:
        raise ManifestError(
            f"given tiles with all of their tokens need no mask, got {given[0].mask_path} with --coords; leave out "
            "--mask and the manifest's mask_path, or give --token-mask tissue"
        )
    if settings.mask_values is not None and not given:
        raise ManifestError(
            f"--mask-value names labels of a mask, got {', '.join(map(str, settings.mask_values))} and no mask; give "
            "one with --mask or the manifest's mask_path, or leave the values out"
        )
    why = "with --coords, which give the tiles; leave it out, or give --token-mask tissue"
    check_areas(settings, with_mask=bool(given), without_effect=None if settings.finds_tissue else why)
    if settings.ink == "off" and (not settings.finds_tissue or len(given) == len(jobs)):
        raise ManifestError(
            "--ink controls how tissue is segmented, got --ink off where no slide's tissue is; leave --ink out"
        )
