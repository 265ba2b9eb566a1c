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
import torch

from maskattn.errors import SlideError
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.inference_linear import packed_weights
from maskattn.slide.asked import recorded_fields, unlike
from maskattn.slide.device_copies import HostCopies, to_device
from maskattn.slide.each_slide import OnTiles, RunProgress, run_each
from maskattn.slide.extract_request import ExtractSettings, check_extraction, recorded_extraction, tile_geometry
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
from maskattn.slide.prediction import SlideFile
from maskattn.slide.reader import SlideReader
from maskattn.slide.slide_run import Stages, cores_left_to
from maskattn.slide.stream import TileBatch, stream_tiles
from maskattn.slide.tile_places import TilePlaces
from maskattn.slide.unchanged import FileState
from maskattn.slide.versions import installed_versions
from maskattn.slide.workers import count_workers

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
    identity = identify_encoder(encoder)

    def finished(job: SlideJob, claim: Claim | None) -> ExtractionRecord | None:
        if claim is not None and claim.ended:
            _clear_leftovers(settings.out_dir, job.slide_id)
        return _finished(job, encoder, identity, settings)

    with packed_weights(encoder):
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
    state = FileState.of(job.path)
    with stages("open"), _slides_own_spacing():
        given = (job.spacing_um, "manifest")
        if settings.slide_spacing_um is not None:
            given = (settings.slide_spacing_um, "override")
        reader = SlideReader(job.path, *given, series=settings.series, isolated=True)
    with reader, _slides_own_spacing():
        found = find_tiles(job, reader, encoder, settings, stages)
        features = layout.path_of(settings.out_dir, found.header)
        dtype = np.float16 if settings.dtype == "float16" else np.float32
        with layout.writing(settings.out_dir, found.header, encoder.embed_dim, dtype) as take, state.kept():
            encoded = _Encoded(reader, encoder, settings, stages, found.places, on_tiles)
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


_EncodedBatch = tuple[HostCopies, np.ndarray]
"""Features of a batch's readable tiles, and the tiles' indices."""


class _Encoded:
    """The encoding of a slide's tiles, with counts of what is done.

    Attributes:
        tiles: the number of tiles encoded so far.
        kept_tokens: the number of their kept tokens.
        reason: why the first unreadable tile could not be read; None if all could.
        workers: the number of processes that decoded tiles; 0 = only this one.
    """

    def __init__(
        self,
        reader: SlideReader,
        encoder: TileEncoder,
        settings: ExtractSettings,
        stages: Stages,
        places: TilePlaces,
        on_tiles: OnTiles | None,
    ) -> None:
        self.tiles = 0
        self.kept_tokens = 0
        self.reason: str | None = None
        self.workers = 0
        self._reader, self._encoder, self._settings = reader, encoder, settings
        self._stages, self._places, self._on_tiles = stages, places, on_tiles

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield features (B, C) float32 of batches of readable tiles, and the tiles' indices (B,).

        Raises:
            SlideError: no tile can be read, or a feature is not finite.
        """
        settings, places, device = self._settings, self._places, self._encoder.device
        workers = count_workers(settings.workers, places.kept_tiles, settings.batch_size)
        batches = stream_tiles(
            self._reader,
            places,
            batch_size=settings.batch_size,
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        done = 0
        encoded: _EncodedBatch | None = None
        with packed_weights(self._encoder), cores_left_to(workers, device):
            while True:
                with self._stages("read", on_host=True):
                    batch = next(batches, None)
                if batch is None:
                    break
                if batch.by_worker:
                    self.workers = workers
                if batch.damages is not None:
                    self._reader.damages.merge(batch.damages)
                self.reason = self.reason or batch.reason
                if bool(batch.readable_B.any()):
                    queued = self._encode(batch)
                    if encoded is not None:  # a GPU computes the next batch while this one is written
                        yield self._on_host(*encoded)
                    encoded = queued
                done += len(batch.rows_B)
                if self._on_tiles is not None:
                    self._on_tiles(done, places.kept_tiles)
            if encoded is not None:
                yield self._on_host(*encoded)
        if not self.tiles:
            raise SlideError(
                f"a slide must have tiles that can be read, got {places.kept_tiles} of {places.kept_tiles} unreadable "
                f"in {self._reader.path}; the first because {self.reason}"
            )

    def _encode(self, batch: TileBatch) -> _EncodedBatch:
        """Queue a batch's work on the device."""
        device, readable_B = self._encoder.device, batch.readable_B
        rows_B = batch.rows_B[readable_B].numpy()
        keep_BHW = None
        if self._places.token_keep_THW is not None:
            kept = np.ascontiguousarray(self._places.token_keep_THW[rows_B])
            self.kept_tokens += int(np.count_nonzero(kept))
            keep_BHW = to_device(kept, device)
        else:
            self.kept_tokens += len(rows_B) * (self._encoder.tile_px // self._encoder.token_px) ** 2
        tiles = batch.tiles_BCHW if bool(readable_B.all()) else batch.tiles_BCHW[readable_B]
        with (
            self._stages("encode", runs_ahead=True),
            torch.inference_mode(),
            _computing_in(self._settings.dtype, device),
        ):
            features = self._encoder.encode_tiles(tiles.to(device, non_blocking=True), keep_BHW)
            return HostCopies(features), rows_B

    def _on_host(self, copies: HostCopies, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of a batch and its tiles' indices, when the device has computed them."""
        with self._stages("encode", on_host=True):
            (features,) = copies.arrays()
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            x, y = self._places.coords_lv0[rows_B[row]]
            raise SlideError(
                f"features must be finite, got {features[row][~np.isfinite(features[row])][0]} in the tile at x={x}, "
                f"y={y} of {self._reader.path} by {self._encoder.name} in {self._settings.dtype}; "
                + ("use --dtype bfloat16 or float32" if self._settings.dtype == "float16" else "check its weights")
            )
        self.tiles += len(rows_B)
        return features, rows_B


@contextlib.contextmanager
def _slides_own_spacing() -> Iterator[None]:
    """Replace ``--spacing-um`` in error messages by this command's option for a slide's spacing."""
    try:
        yield
    except SlideError as error:
        raise type(error)(str(error).replace("--spacing-um", "--slide-spacing-um")) from error


@contextlib.contextmanager
def _computing_in(dtype: str, device: torch.device) -> Iterator[None]:
    if dtype == "float32":
        yield
        return
    with torch.autocast(device.type, dtype=getattr(torch, dtype)):
        yield


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
