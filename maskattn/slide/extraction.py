"""Extract the features of slides' tiles, in the layout of the tool that will read them.

reader → tissue → tiles (or another tool's coordinates) → stream → encoder → file. Features are written batch by batch:
memory is bounded by the batch size and the slide's thumbnail, apart from the positions of the tiles.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.inference_linear import packed_weights
from maskattn.slide.asked import recorded_fields, unlike
from maskattn.slide.each_slide import OnTiles, RunProgress, run_each
from maskattn.slide.extract_request import ExtractSettings, check_extraction, recorded_extraction, tile_geometry
from maskattn.slide.extraction_loop import ExtractionLoop, computing_in
from maskattn.slide.extraction_record import (
    EncoderIdentity,
    ExtractionOutcome,
    ExtractionRecord,
    read_record,
    record_path,
)
from maskattn.slide.extraction_tiles import coords_file, find_tiles
from maskattn.slide.fleet.claims import Claim
from maskattn.slide.layouts import FEATURE_LAYOUTS, FeatureLayout, TileHeader, read_coords
from maskattn.slide.layouts.hierarchical import RegionLayout
from maskattn.slide.manifest import SlideJob
from maskattn.slide.names import as_text
from maskattn.slide.opened_ahead import open_slide
from maskattn.slide.output_folder import may_be_finished
from maskattn.slide.packed_meanwhile import packed_meanwhile
from maskattn.slide.prediction import SlideFile
from maskattn.slide.reader import SlideReader
from maskattn.slide.slide_run import Stages
from maskattn.slide.versions import installed_versions

__all__ = ["extract_slide", "extract_slides", "identify_encoder"]

# The files that layouts write end in one of these; a killed run may leave an incomplete one under a temporary name.
_ENDINGS = (".h5", ".pt", ".meta.json", ".coordinates.npz", ".coordinates.meta.json", "_patches.h5", ".extraction.json")


def identify_encoder(encoder: TileEncoder) -> EncoderIdentity:
    """Return the identity of the encoder that records state."""
    return EncoderIdentity(
        encoder.name,
        encoder.sha256[:16],
        encoder.embed_dim,
        encoder.pooling,
        encoder.vit is not None,
        encoder.card.licence,
    )


def extract_slides(
    jobs: Sequence[SlideJob],
    encoder: TileEncoder,
    settings: ExtractSettings,
    progress: RunProgress[ExtractionOutcome] | None = None,
) -> list[ExtractionOutcome]:
    """Extract features of slides, skip those that an earlier run finished, and keep ``settings.out_dir/summary.csv``.

    Args:
        jobs: the slides, with distinct ids.
        encoder: the encoder on the device to use.
        settings: the request.
        progress: called at every step.

    Returns:
        The outcomes in the order of the jobs; with a limit, only those of the slides that were run. A failed slide is
        an outcome, not an exception.

    Raises:
        ManifestError: settings contradict each other, or one would have no effect.
        OutputError: the output folder, or its summary, cannot be written.
    """
    check_extraction(jobs, settings, encoder)
    with packed_weights(encoder):
        return _extract(jobs, encoder, settings, _identified(encoder, settings), progress)


def _identified(encoder: TileEncoder, settings: ExtractSettings) -> EncoderIdentity:
    """Return the encoder's identity, and pack its weights meanwhile unless all slides may be finished."""
    if may_be_finished(settings.out_dir, settings.overwrite):
        return identify_encoder(encoder)
    with computing_in(settings.dtype, encoder.device):
        return packed_meanwhile(lambda: identify_encoder(encoder), encoder, masked=settings.token_mask == "tissue")


def _extract(
    jobs: Sequence[SlideJob],
    encoder: TileEncoder,
    settings: ExtractSettings,
    identity: EncoderIdentity,
    progress: RunProgress[ExtractionOutcome] | None,
) -> list[ExtractionOutcome]:
    def finished(job: SlideJob, claim: Claim | None) -> ExtractionRecord | None:
        if claim is not None and claim.ended:
            _clear_leftovers(settings.out_dir, job.slide_id)
        return _finished(job, encoder, identity, settings)

    return run_each(
        jobs,
        settings.out_dir,
        ExtractionOutcome,
        finished,
        lambda job, claim, on_tiles: extract_slide(job, encoder, settings, on_tiles, identity, claim),
        progress,
        sharing=settings.sharing,
        cache=settings.cache,
        request=f"{identity} {recorded_fields(settings)}",
        sweep=lambda: _clear_leftovers(settings.out_dir),
    )


def extract_slide(
    job: SlideJob,
    encoder: TileEncoder,
    settings: ExtractSettings,
    on_tiles: OnTiles | None = None,
    identity: EncoderIdentity | None = None,
    claim: Claim | None = None,
) -> ExtractionRecord:
    """Extract the features of one slide, and write them below ``settings.out_dir``, completely or not at all.

    Args:
        job: the slide.
        encoder: the encoder on the device to use.
        settings: the request.
        on_tiles: called with (tiles done, tiles to do) after every batch.
        identity: ``identify_encoder(encoder)`` if the caller has it already; computing it reads all weights.
        claim: this process's claim on the slide, if several processes share the output folder.

    Returns:
        The record, as written next to the features.

    Raises:
        SlideError: the slide, its mask or its coordinates cannot be used, a feature is not finite, or the slide changed
            while it ran.
        ClaimLostError: another process took the slide over in the meantime.
        OSError: the features cannot be written.
    """
    if job.problem is not None:
        raise SlideError(job.problem)
    identity = identity or identify_encoder(encoder)
    stages = Stages(encoder.device)
    layout = _layout(settings, encoder)
    with stages("open"), _slides_own_spacing():
        state, reader = open_slide(job, settings.slide_spacing_um, settings.series)
    with reader, _slides_own_spacing():
        found = find_tiles(job, reader, encoder, settings, stages)
        features = layout.path_of(settings.out_dir, found.header)
        dtype = np.float16 if settings.dtype == "float16" else np.float32
        with layout.writing(settings.out_dir, found.header, encoder.embed_dim, dtype) as take, state.kept():
            encoded = ExtractionLoop(reader, encoder, settings, stages, found.places, on_tiles)
            for features_BC, rows_B in encoded.batches():
                tissue_T = found.places.tissue_T
                with stages("write", on_host=True):
                    tissue_B = None if tissue_T is None else tissue_T[rows_B]
                    take(features_BC.astype(dtype), found.places.coords_lv0[rows_B], tissue_B)
            record = ExtractionRecord(
                slide_id=job.slide_id,
                features=os.path.relpath(features, settings.out_dir),
                encoder=identity,
                slide=SlideFile.of(job, reader.info),
                settings=recorded_extraction(job, settings, encoder)
                | {"workers": encoded.workers, "device": str(encoder.device)},
                tiles=encoded.tiles,
                cells=found.places.cells,
                unreadable_tiles=found.places.kept_tiles - encoded.tiles,
                kept_tokens=encoded.kept_tokens,
                tokens=encoded.tiles * (encoder.tile_px // encoder.token_px) ** 2,
                tissue=found.describe_tissue(),
                notes=_notes(reader, encoded.reason),
                timings_s={name: round(seconds, 4) for name, seconds in stages.seconds.items()},
                versions=installed_versions("timm", "transformers"),
            )
            state.check()
            if claim is not None:
                claim.check()
            # The record comes before the features get their names: features without a record are another tool's.
            features.unlink(missing_ok=True)
            record.write(record_path(features))
    return record


@contextlib.contextmanager
def _slides_own_spacing() -> Iterator[None]:
    """Replace ``--spacing-um`` in error messages by this command's option for a slide's spacing."""
    try:
        yield
    except SlideError as error:
        raise type(error)(str(error).replace("--spacing-um", "--slide-spacing-um")) from error


def _finished(
    job: SlideJob, encoder: TileEncoder, identity: EncoderIdentity, settings: ExtractSettings
) -> ExtractionRecord | None:
    """Return the record of an earlier run with the same request; None if the slide must be run.

    Raises:
        SlideError: existing features were extracted by another request, or written by another tool.
    """
    if settings.overwrite:
        return None
    path = _features_path(_layout(settings, encoder), job, encoder, settings)
    finished = read_record(record_path(path)) if path.exists() else None
    if finished is None:
        if path.exists():
            raise SlideError(
                f"existing features must have a record of their extraction, got {as_text(path)} without "
                f"{record_path(path).name}, which another tool wrote; choose another --out, or replace it with "
                "--overwrite"
            )
        return None
    spacing_um = settings.slide_spacing_um or job.spacing_um or finished.slide.spacing_um
    found_and_asked: list[tuple[str, Any, Any]] = [
        ("encoder", f"{finished.encoder.name} {finished.encoder.sha256}", f"{identity.name} {identity.sha256}"),
        *finished.slide.identity(job),
        ("slide_spacing_um", finished.slide.spacing_um, spacing_um),
    ]
    other = [(name, found, asked) for name, found, asked in found_and_asked if found != asked]
    for name, found, asked in (*other, *_unlike(finished, job, encoder, settings)):
        raise SlideError(
            f"finished features must have been extracted as asked, got {name}: {found} in {as_text(path)} and asked "
            f"for {asked}; run it again with --overwrite or choose another --out"
        )
    return finished


def _unlike(
    finished: ExtractionRecord, job: SlideJob, encoder: TileEncoder, settings: ExtractSettings
) -> Iterator[tuple[str, Any, Any]]:
    return unlike(finished.settings, recorded_extraction(job, settings, encoder), settings)


def _layout(settings: ExtractSettings, encoder: TileEncoder) -> FeatureLayout | RegionLayout:
    """Return the layout that writes the features."""
    if settings.region_px is None:
        return FEATURE_LAYOUTS[settings.layout]
    return RegionLayout(settings.region_px // tile_geometry(settings, encoder)[0])


def _features_path(
    layout: FeatureLayout | RegionLayout, job: SlideJob, encoder: TileEncoder, settings: ExtractSettings
) -> Path:
    """Return the path of a slide's features, from what is known before the slide is opened."""
    if settings.coords_dir is not None:
        tiles = read_coords(coords_file(job, settings.coords_dir))
        header = TileHeader(
            slide_id=job.slide_id,
            patch_size_px=tiles.patch_size_px,
            spacing_um=tiles.spacing_um,
            overlap_px=tiles.overlap_px,
            encoder=encoder.name,
        )
    else:
        patch_px, overlap_px, spacing_um = tile_geometry(settings, encoder)
        header = TileHeader(
            slide_id=job.slide_id,
            patch_size_px=patch_px,
            spacing_um=spacing_um,
            overlap_px=overlap_px,
            encoder=encoder.name,
        )
    return layout.path_of(settings.out_dir, header)


def _clear_leftovers(out_dir: Path, slide_id: str | None = None) -> None:
    """Remove the incomplete files of killed runs for a slide, or all slides; no process may be running them."""
    for path in out_dir.rglob(".*.partial"):
        name = path.name.removesuffix(".partial").rpartition(".")[0]
        if name in {f".{slide_id}{ending}" for ending in _ENDINGS} if slide_id else name.endswith(_ENDINGS):
            path.unlink(missing_ok=True)


def _notes(reader: SlideReader, reason: str | None) -> tuple[str, ...]:
    notes = list(reader.notes)
    if reason is not None:
        notes.append(f"unreadable tiles were left out; the first because {reason}")
    return tuple(notes)
