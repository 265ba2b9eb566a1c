"""``maskattn infer``: a folder of slides to predictions and maps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from maskattn.cli import slide_runs
from maskattn.cli.options import Debug, Mask, takes_settings
from maskattn.cli.reporting import errors_in_one_line, map_warnings, say, tell
from maskattn.slide.request import RunSettings

__all__ = ["infer"]


@takes_settings
def infer(
    *,
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
    settings: RunSettings,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    impl: Annotated[str | None, typer.Option("--impl", help="Attention implementation; by default the best.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write OUT/report.html at the end.")] = False,
    debug: Debug = False,
) -> None:
    """Predict slides and explain the predictions.

    Finished slides are skipped, broken ones are reported.
    """
    with errors_in_one_line(debug):
        from maskattn.errors import ManifestError
        from maskattn.slide.manifest import collect_jobs
        from maskattn.slide.output_folder import prepare_output
        from maskattn.slide.request import check_request

        notes: list[str] = []
        jobs = collect_jobs(slides or (), notes.append, manifest)
        for note in notes:
            tell(note)
        if mask is not None and len(jobs) != 1:
            raise ManifestError(f"--mask serves one slide, got {len(jobs)}; name masks in a manifest (mask_path)")
        if mask is not None:
            jobs = [replace(jobs[0], mask_path=mask)]
        check_request(jobs, settings)  # once more when the model is there: it may leave nothing out
        prepare_output(settings.out_dir)
        outcomes = slide_runs.run(jobs, slide_runs.load_model(model or slide_runs.BUNDLED, impl, device), settings)
        if report:
            from maskattn.slide.report import write_report

            say(f"report: {write_report(settings.out_dir)}")
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    say(f"{len(outcomes) - failed} of {len(outcomes)} slides have outputs; summary: {settings.out_dir / 'summary.csv'}")
    for line in map_warnings(outcomes):
        say(line)
    for note in notes:
        say(note)
    if failed:
        raise typer.Exit(1)
