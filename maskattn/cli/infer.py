"""``maskattn infer``: a folder of slides to predictions and maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from maskattn.cli import slide_runs
from maskattn.cli.options import Debug, Force, Ink, Mask, MaskValues, Series, Spacing
from maskattn.cli.reporting import errors_in_one_line, say, tell

__all__ = ["infer"]


def infer(
    out: Annotated[Path, typer.Option("--out", help="Folder of outputs; made if it is not there.", show_default=False)],
    slides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Slide files, folders, globs, or manifests (.csv).", metavar="SLIDE...", show_default=False
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A slide model, NAME.safetensors; by default the demonstration's.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option("--manifest", help="A table: slide_id,slide_path[,mask_path][,spacing_um]."),
    ] = None,
    mask: Mask = None,
    mask_value: MaskValues = None,
    ink: Ink = "auto",
    force: Force = False,
    spacing_um: Spacing = None,
    series: Series = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Relevance of tokens too; reads each slide twice.")] = False,
    no_mask: Annotated[bool, typer.Option("--no-mask", help="Attend to glass too, for comparison.")] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Tiles at a time; bounds the memory.", min=1, max=65536)
    ] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", help="Processes that decode tiles; by default some for large slides.", min=0, max=512
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    impl: Annotated[str | None, typer.Option("--impl", help="Attention implementation; by default the best.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run finished slides again.")] = False,
    debug: Debug = False,
) -> None:
    """Predict slides and explain the predictions; finished slides are skipped, broken ones are reported."""
    with errors_in_one_line(debug):
        from maskattn.errors import ManifestError
        from maskattn.slide.manifest import collect_jobs
        from maskattn.slide.output_folder import prepare_output
        from maskattn.slide.pipeline import RunSettings
        from maskattn.slide.request import check_request

        notes: list[str] = []
        jobs = collect_jobs(slides or (), notes.append, manifest)
        for note in notes:
            tell(note)
        if mask is not None and len(jobs) != 1:
            raise ManifestError(f"--mask serves one slide, got {len(jobs)}; name masks in a manifest (mask_path)")
        if mask is not None:
            jobs = [replace(jobs[0], mask_path=mask)]
        settings = RunSettings(
            out_dir=out,
            batch_size=batch_size,
            workers=workers,
            tokens=tokens,
            masked=not no_mask,
            overwrite=overwrite,
            spacing_um=spacing_um,
            series=series,
            mask_values=tuple(mask_value) if mask_value else None,
            ink=ink,
            force=force,
        )
        check_request(jobs, settings)  # once more when the model is there: it may leave nothing out
        prepare_output(out)
        outcomes = slide_runs.run(jobs, slide_runs.load_model(model or slide_runs.BUNDLED, impl, device), settings)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    say(f"{len(outcomes) - failed} of {len(outcomes)} slides have outputs; summary: {out / 'summary.csv'}")
    for note in notes:
        say(note)
    if failed:
        raise typer.Exit(1)
