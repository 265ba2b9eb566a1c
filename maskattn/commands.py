"""The commands of ``maskattn``: they read arguments, call the package and say in one line what went wrong.

Exit codes: 0 = ok, 1 = a slide failed, 2 = wrong usage or an output folder that cannot be written, 130 = interrupted.
What a command is asked for goes to stdout; progress and errors go to stderr.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from maskattn.progress import ProgressBars, scores_of

if TYPE_CHECKING:
    from maskattn.nn.slide_model import SlideModel
    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.pipeline import RunSettings
    from maskattn.slide.prediction import SlideOutcome

__all__ = ["app"]

app = typer.Typer(
    help="Slide in, prediction and heat maps out; background costs nothing and counts for nothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_BUNDLED = Path(__file__).parent / "demo" / "model.safetensors"
_MASK_THUMBNAIL_PX = 2048

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Slide = Annotated[Path, typer.Argument(help="A slide file.", metavar="SLIDE", show_default=False)]
Spacing = Annotated[
    float | None, typer.Option("--spacing-um", help="µm per level-0 pixel, in place of what the slide says.", min=0.0)
]
Mask = Annotated[Path | None, typer.Option("--mask", help="Your own tissue mask of this slide, at any spacing.")]
MaskValues = Annotated[
    list[int] | None, typer.Option("--mask-value", help="A label of the mask that means tissue (may be repeated).")
]


@app.command()
def infer(
    out: Annotated[Path, typer.Option("--out", help="Folder of outputs; made if it is not there.", show_default=False)],
    slides: Annotated[
        list[str] | None,
        typer.Argument(help="Slide files, folders, globs, or CSV manifests.", metavar="SLIDE...", show_default=False),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="A slide model, NAME.safetensors; by default the demonstration's.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="CSV: slide_id,slide_path[,mask_path][,spacing_um].")
    ] = None,
    mask: Mask = None,
    mask_value: MaskValues = None,
    spacing_um: Spacing = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Relevance of tokens too; reads each slide twice.")] = False,
    no_mask: Annotated[bool, typer.Option("--no-mask", help="Attend to glass too, for comparison.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Tiles at a time; bounds the memory.", min=1)] = 32,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Processes that decode tiles; by default some for large slides.", min=0),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    impl: Annotated[str | None, typer.Option("--impl", help="Attention implementation; by default the best.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run finished slides again.")] = False,
    debug: Debug = False,
) -> None:
    """Predict slides and explain the predictions; finished slides are skipped, broken ones are reported."""
    with _errors_in_one_line(debug):
        from maskattn.slide.manifest import ManifestError, collect_jobs, read_manifest
        from maskattn.slide.output_folder import prepare_output
        from maskattn.slide.pipeline import RunSettings

        if manifest is not None:
            read_manifest(manifest)
        jobs = collect_jobs([*(slides or ()), *(() if manifest is None else (manifest,))])
        if mask is not None and len(jobs) != 1:
            raise ManifestError(f"--mask serves one slide, got {len(jobs)}; name masks in a manifest (mask_path)")
        if mask is not None:
            jobs = [replace(jobs[0], mask_path=mask)]
        prepare_output(out)
        settings = RunSettings(
            out_dir=out,
            batch_size=batch_size,
            workers=workers,
            tokens=tokens,
            masked=not no_mask,
            overwrite=overwrite,
            spacing_um=spacing_um,
            mask_values=tuple(mask_value) if mask_value else None,
        )
        outcomes = _run(jobs, _load_model(model or _BUNDLED, impl, device), settings)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    typer.echo(f"{len(outcomes) - failed} of {len(outcomes)} slides have outputs; summary: {out / 'summary.csv'}")
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of outputs; made if it is not there.")] = Path("demo_out"),
    seed: Annotated[int, typer.Option("--seed", help="Which slide to draw.", min=0)] = 0,
    debug: Debug = False,
) -> None:
    """Draw a fresh synthetic slide with a known answer, predict it with the bundled model, write every output."""
    with _errors_in_one_line(debug):
        from maskattn.demo.synthetic import CLASSES, make_slide, write_slide
        from maskattn.slide.manifest import SlideJob
        from maskattn.slide.output_folder import prepare_output
        from maskattn.slide.pipeline import RunSettings
        from maskattn.slide.tables import replacing

        prepare_output(out)
        model = _load_model(_BUNDLED, None, "auto")
        slide = make_slide(seed)
        path = out / f"synthetic_{seed}.tiff"
        with replacing(path) as temporary:
            write_slide(slide, temporary)
        outcome = _run([SlideJob(path.stem, path)], model, RunSettings(out, tokens=True, overwrite=True))[0]
    if outcome.prediction is None:
        raise typer.Exit(1)
    typer.echo(f"slide       {path}")
    for name in sorted(entry.name for entry in (out / path.stem).iterdir()):
        typer.echo(f"output      {out / path.stem / name}")
    typer.echo(f"summary     {out / 'summary.csv'}")
    typer.echo(f"known       {CLASSES[slide.label]}")
    typer.echo(f"predicted   {outcome.prediction.prediction} ({scores_of(outcome.prediction)})")


@app.command()
def tissue(
    slide: Slide,
    out: Annotated[
        Path | None, typer.Option("--out", help="PNG, or folder for it; by default SLIDE_tissue.png in this folder.")
    ] = None,
    mask: Mask = None,
    mask_value: MaskValues = None,
    spacing_um: Spacing = None,
    debug: Debug = False,
) -> None:
    """Show where the tissue is: an overlay as PNG, and its statistics as JSON on stdout."""
    with _errors_in_one_line(debug):
        from maskattn.slide.output_folder import prepare_output
        from maskattn.slide.overlay import write_mask_overlay
        from maskattn.slide.reader import SlideReader
        from maskattn.slide.tissue import find_tissue, load_mask

        path = Path() if out is None else out
        if path.suffix.lower() != ".png":
            path = path / f"{slide.stem}_tissue.png"
        prepare_output(path.parent)
        with SlideReader(slide, spacing_um) as reader:
            info = reader.info
            labels = tuple(mask_value) if mask_value else None
            found = find_tissue(reader) if mask is None else load_mask(mask, info, labels)
            write_mask_overlay(path, reader.thumbnail(_MASK_THUMBNAIL_PX), found, info.width_px)
        height, width = found.mask_HW.shape
        area_mm2 = info.width_px * info.height_px * info.spacing_um**2 / 1e6
        statistics = {
            "slide": str(slide),
            "method": found.method,
            "tissue_fraction": found.tissue_fraction,
            "tissue_mm2": found.tissue_fraction * area_mm2,
            "slide_mm2": area_mm2,
            "mask_px": [width, height],
            "mask_spacing_um": found.spacing_um,
            "notes": list(found.notes),
            "overlay": str(path),
        }
    typer.echo(json.dumps(statistics, indent=2, ensure_ascii=False))


@app.command()
def info(
    slide: Slide,
    spacing_um: Spacing = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print what a slide file says of itself."""
    with _errors_in_one_line(debug):
        from maskattn.slide.reader import SlideReader

        with SlideReader(slide, spacing_um) as reader:
            facts = reader.describe()
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            typer.echo(f"{name}:")
            for key, text in value.items():
                typer.echo(f"  {key} = {text}")
        elif isinstance(value, list):
            typer.echo(f"{name}: {'; '.join(map(str, value)) or 'none'}")
        else:
            typer.echo(f"{name}: {value}")


@app.command()
def explain(
    image: Annotated[Path, typer.Argument(help="An image file.", metavar="IMAGE", show_default=False)],
    model: Annotated[
        str,
        typer.Option("--model", help="timm:NAME, hf-hub:ORG/NAME, or a file or folder of weights.", show_default=False),
    ],
    target: Annotated[
        list[int] | None, typer.Option("--target", help="A class (may be repeated); by default the three likeliest.")
    ] = None,
    concept: Annotated[
        list[Path] | None, typer.Option("--concept", help="An example image of a concept (may be repeated).")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="A mask image; tokens that are all black are left out.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="cdam, smooth, integrated or integrated-norm.")] = "cdam",
    num_heads: Annotated[int | None, typer.Option("--num-heads", help="For a file, which does not say it.")] = None,
    pixel_mean: Annotated[
        tuple[float, float, float] | None,
        typer.Option("--pixel-mean", help="By default the model's own, or ImageNet's."),
    ] = None,
    pixel_std: Annotated[tuple[float, float, float] | None, typer.Option("--pixel-std", help="Likewise.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="PNG; by default IMAGE_explained.png in this folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Explain one image: a picture of it beside its attention and its class maps; scores go to stdout."""
    with _errors_in_one_line(debug):
        import torch

        from maskattn.explain import Concept
        from maskattn.explain import single_image as single
        from maskattn.explain.pictures import draw_explanation
        from maskattn.nn.checkpoints import load_vit
        from maskattn.slide.tables import replacing

        if target and concept:
            raise ValueError("--target and --concept ask for different things; give one of them")
        vit = load_vit(model, num_heads=num_heads)
        mean, std = single.normalisation_of(model)
        mean, std = pixel_mean or mean, pixel_std or std
        pixels = single.read_image(image, single.size_for(vit, image))
        inputs = single.normalised(pixels, mean, std)
        kept = None if keep is None else single.read_keep(keep, vit.patch_embed.grid_of(inputs))
        targets: list[int] | Concept | None = target
        if concept:
            own = tuple(side * vit.patch_embed.patch_size for side in vit.grid_HW)
            examples = [single.normalised(single.read_image(path, (own[0], own[1])), mean, std) for path in concept]
            targets = Concept.from_images(vit, torch.cat(examples))
        found = single.explain_image(vit, inputs, targets, kept, method)
        titles = [f"{name}: {score:.3g}" for name, score in zip(found.names, found.scores_M.tolist(), strict=True)]
        maps = dict(zip(titles, found.maps_MHW, strict=True))
        path = Path(f"{image.stem}_explained.png") if out is None else out
        with replacing(path) as temporary:
            title = f"{image.name}, {model}, {method}"
            figure = draw_explanation(
                pixels, found.attention_HW, maps, title, keep_HW=None if kept is None else kept[0]
            )
            figure.savefig(temporary, format="png", dpi=120)
    for title in titles:
        typer.echo(title)
    typer.echo(f"picture     {path}")


@app.command()
def doctor(debug: Debug = False) -> None:
    """Say what runs on this machine, found by trying it, and how to get what is missing."""
    with _errors_in_one_line(debug):
        from maskattn.doctor import examine

        findings = examine()
    for finding in findings:
        remedy = f"; to get it: {finding.remedy}" if finding.remedy and not finding.works else ""
        typer.echo(f"{'ok ' if finding.works else 'no '} {finding.subject:<24} {finding.detail}{remedy}")


@contextmanager
def _errors_in_one_line(debug: bool) -> Iterator[None]:
    """Turn an error into one line on stderr and an exit code; with ``debug`` the traceback comes before it."""
    if debug:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("maskattn").setLevel(logging.DEBUG)
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; finished slides are kept, run the same command again to go on", 130)
    except Exception as error:  # the last resort of a command line
        if debug:
            traceback.print_exc()
        _fail(*_in_one_line(error))


def _in_one_line(error: Exception) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = {"timm": "timm", "transformers": "hf"}.get(error.name, "slide")
        return (
            f"this command needs the package {error.name}, which is not installed; pip install 'maskattn[{extra}]'",
            2,
        )
    if type(error).__name__ == "SlideError":
        return text, 1
    if isinstance(error, OSError | ValueError):
        return text, 2
    return f"{type(error).__name__}: {text} (--debug shows where)", 1


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"maskattn: {message}", err=True)
    raise typer.Exit(code)


def _load_model(path: Path, impl: str | None, device: str) -> SlideModel:
    """The slide model on its device, after a trial of the attention it will use.

    Raises:
        FileNotFoundError, ValueError: there is no such model, device or implementation.
    """
    import torch

    from maskattn.doctor import try_attention
    from maskattn.nn.slide_model import SlideModel

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be auto, or one that torch can use, got {device!r}: {error}") from error
    if impl is not None:
        try_attention(impl, device)
    return SlideModel.load(path, impl=impl, device=device)


def _run(jobs: list[SlideJob], model: SlideModel, settings: RunSettings) -> list[SlideOutcome]:
    from maskattn.slide.run import run_slides

    config = model.config
    if config.demonstration:
        typer.echo(f"maskattn: {config.name}: {config.note}", err=True)
    with ProgressBars(len(jobs)) as bars:
        return run_slides(jobs, model, settings, bars)
