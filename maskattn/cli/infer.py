"""``maskattn infer``: predicts slides and writes maps that explain the predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from maskattn.cli import options, slide_runs
from maskattn.cli.concepts import read_words
from maskattn.cli.reporting import errors_in_one_line, map_warnings, say
from maskattn.slide.request import RunSettings

__all__ = ["infer"]


@options.takes_settings
def infer(
    *,
    slides: options.Slides = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="A slide model: a folder, or a checkpoint of CLAM, ABMIL, TransMIL, STAMP, TITAN or GigaPath; by "
            "default the demonstration's.",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="Tile encoder, for a model without its own: see `maskattn encoders`."),
    ] = None,
    weights: options.Weights = None,
    num_heads: options.NumHeads = None,
    trust_code: options.TrustCode = False,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Names of the classes, with commas, for a model without them.")
    ] = None,
    token_mask: Annotated[
        Literal["none", "tissue"] | None,
        typer.Option("--token-mask", help="Tokens of a tile that the encoder sees; by default as in training."),
    ] = None,
    patch_px: Annotated[
        int | None, typer.Option("--patch-size", min=1, help="Side of a tile in px; by default the model's.")
    ] = None,
    tile_spacing_um: Annotated[
        float | None,
        typer.Option("--tile-spacing-um", min=0.02, max=40, help="µm per px of a tile; by default the model's."),
    ] = None,
    concepts: Annotated[
        Path | None,
        typer.Option(
            "--concepts",
            help="Instead of --model: concepts in the space of the encoder's output, .npy, .safetensors or .csv.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="The same as a text (may be repeated), if --encoder has a text tower."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Factor of the cosine; by default the file's or the encoder's own, or 100."),
    ] = None,
    best_tiles: Annotated[
        int | None,
        typer.Option("--best-tiles", min=1, help="Number of best tiles pooled for each concept; by default all."),
    ] = None,
    manifest: options.Manifest = None,
    mask: options.Mask = None,
    settings: RunSettings,
    device: options.Device = "auto",
    devices: options.Devices = None,
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    gpu_memory_gib: options.GpuMemory = None,
    memory_gib: options.Memory = None,
    impl: options.Impl = None,
    report: Annotated[bool, typer.Option("--report", help="Write OUT/report.html at the end.")] = False,
    debug: options.Debug = False,
) -> None:
    """Predict slides and explain the predictions.

    With --features the tiles' features are read, not made; without slides the outputs are scores and relevance.h5.
    Finished slides are skipped, broken ones are reported.
    """
    with errors_in_one_line(debug):
        from maskattn.cli.progress import lines_of_prediction
        from maskattn.slide.output_folder import prepare_output
        from maskattn.slide.request import check_request

        jobs, notes = slide_runs.jobs_asked_for(slides, manifest, mask, settings.features_dir)
        check_request(jobs, settings)  # checked again with the model
        prepare_output(settings.out_dir)
        chosen = slide_runs.Chosen(
            model=model or slide_runs.BUNDLED,
            encoder=encoder,
            weights=weights,
            num_heads=num_heads,
            trust_code=trust_code,
            classes=None if classes is None else tuple(name.strip() for name in classes.split(",")),
            patch_px=patch_px,
            spacing_um=tile_spacing_um,
            token_mask=token_mask,
            with_features=settings.features_dir is not None,
            other_encoder=settings.other_encoder,
        )
        if concepts is not None or prompt:
            if model is not None:
                raise ValueError("concepts replace the slide model, got --model in addition; give one of them")
            words = read_words(concepts, prompt, encoder, temperature)
        else:
            words = None
        work = slide_runs.Inference(jobs, chosen, settings, words, best_tiles, impl)
        where = slide_runs.Where(device, devices, engine, ray_address, gpu_memory_gib, memory_gib)
        outcomes = slide_runs.run(work, where, lines_of_prediction)
        if report:
            from maskattn.slide.report import write_report

            say(f"report: {write_report(settings.out_dir)}")
    slide_runs.end(outcomes, settings.out_dir, "outputs", (*map_warnings(outcomes), *notes))
