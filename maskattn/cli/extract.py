"""``maskattn extract``: extracts the features of the tiles of slides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from maskattn.cli import options, slide_runs
from maskattn.cli.imports import imports
from maskattn.cli.reporting import errors_in_one_line
from maskattn.cli.side_by_side import gib_with_encoder
from maskattn.slide.extract_request import ExtractSettings

if TYPE_CHECKING:
    from pathlib import Path

    from maskattn.cli.device_member import Run
    from maskattn.slide.extraction_record import ExtractionOutcome
    from maskattn.slide.manifest import SlideJob

__all__ = ["extract"]


@options.takes_settings
def extract(
    *,
    slides: options.Slides = None,
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder", help="A name that `maskattn encoders` lists, timm:NAME, hf-hub:ORG/NAME, a file or a folder."
        ),
    ],
    weights: options.Weights = None,
    num_heads: options.NumHeads = None,
    trust_code: options.TrustCode = False,
    manifest: options.Manifest = None,
    mask: options.Mask = None,
    settings: ExtractSettings,
    device: options.Device = "auto",
    devices: options.Devices = None,
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    gpu_memory_gib: options.GpuMemory = None,
    memory_gib: options.Memory = None,
    impl: options.Impl = None,
    debug: options.Debug = False,
) -> None:
    """Extract the features of slides' tiles by any encoder.

    Background tiles are skipped. Finished slides are skipped, broken ones are reported.
    """
    with errors_in_one_line(debug):
        from maskattn.slide.extract_request import check_extraction
        from maskattn.slide.output_folder import prepare_output

        jobs, notes = slide_runs.jobs_asked_for(slides, manifest, mask)
        check_extraction(jobs, settings)  # checked again with the encoder, which may have no spacing of its own
        prepare_output(settings.out_dir)

        work = _Extraction(jobs, encoder, weights, num_heads, trust_code, impl, settings)
        where = slide_runs.Where(device, devices, engine, ray_address, gpu_memory_gib, memory_gib)
        outcomes = slide_runs.run(work, where, _lines_of)
    slide_runs.end(outcomes, settings.out_dir, "features", notes)


@dataclass(frozen=True)
class _Extraction:
    """The work of the command on one device."""

    jobs: list[SlideJob]
    encoder: str
    weights: Path | None
    num_heads: int | None
    trust_code: bool
    impl: str | None
    settings: ExtractSettings

    @property
    def out_dir(self) -> Path:
        """The output folder."""
        return self.settings.out_dir

    @property
    def process_gib(self) -> float | None:
        """Memory of each of several processes, if the encoder is a file of weights that is not large."""
        return gib_with_encoder(self.encoder, self.weights)

    def under(self, settings: ExtractSettings) -> _Extraction:
        """The same work under other settings."""
        return replace(self, settings=settings)

    def on(self, device: str, *, alone: bool = False) -> tuple[str, Run[ExtractionOutcome]]:
        """Load the encoder."""
        settings = self.settings
        slide_runs.start_reading(
            self.jobs, settings, settings.slide_spacing_um, alone=alone, finds_tissue=settings.finds_tissue
        )
        with imports():
            from maskattn.nn.encoders import load_encoder
            from maskattn.slide.extract_request import check_extraction
            from maskattn.slide.extraction import extract_slides

            chosen = load_encoder(
                self.encoder,
                device=slide_runs.device_named(device, self.impl),
                impl=self.impl,
                weights=self.weights,
                num_heads=self.num_heads,
                trust_code=self.trust_code,
            )
        check_extraction(self.jobs, self.settings, chosen)
        note = _of_the_encoder(chosen.name, chosen.card.licence, chosen.why_not)
        return note, lambda progress, settings: extract_slides(self.jobs, chosen, settings, progress)


def _of_the_encoder(name: str, licence: str, why_not: str) -> str:
    how = f"runs as its library built it ({why_not})" if why_not else "runs packed"
    return f"{name} {how}; licence of its weights: {licence or 'unknown'}"


def _lines_of(outcome: ExtractionOutcome) -> list[str]:
    """Return the lines that report a slide's outcome and the notes on it."""
    record = outcome.record
    if record is None:
        if outcome.status == "skipped":
            return []  # another process ran it and has reported it
        return [f"failed   {outcome.slide_id}: {outcome.reason}"]
    tokens = f", {record.kept_tokens / max(1, record.tokens):.0%} of their tokens" if record.tokens else ""
    tiles = f"{record.tiles:,} of {record.cells:,} tiles{tokens}"
    lines = [f"{outcome.status:<8} {outcome.slide_id}: {tiles}, {record.features}, {outcome.seconds:.1f} s"]
    if outcome.status == "ok":
        of_tissue = [] if record.tissue is None else record.tissue["notes"]
        lines += [f"note     {outcome.slide_id}: {note}" for note in dict.fromkeys((*of_tissue, *record.notes))]
    return lines
