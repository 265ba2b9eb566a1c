"""Options that several commands share, and options that are derived from the fields of a run's settings.

A command with a parameter ``settings`` of a request dataclass such as ``RunSettings`` that is decorated with
:func:`takes_settings` has an option for every field of the dataclass, with the help text that the field declares.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from maskattn.slide.asked import asked_of, fields_of
from maskattn.slide.request import RunSettings

__all__ = [
    "CacheDir",
    "CacheGb",
    "ConfigFile",
    "Debug",
    "Device",
    "Devices",
    "Engine",
    "Exclude",
    "ExcludeClasses",
    "Force",
    "GpuMemory",
    "Impl",
    "Ink",
    "Manifest",
    "Mask",
    "MaskClasses",
    "MaskValues",
    "Memory",
    "NumHeads",
    "Outputs",
    "RayAddress",
    "Roi",
    "RoiClasses",
    "Series",
    "Slide",
    "Slides",
    "SlidesFolder",
    "Spacing",
    "TrustCode",
    "Weights",
    "takes_settings",
]


def _plausible_spacing(spacing_um: float | None) -> float | None:
    from maskattn.slide.spacing import MAX_SPACING_UM, MIN_SPACING_UM

    if spacing_um is not None and not MIN_SPACING_UM <= spacing_um <= MAX_SPACING_UM:
        raise typer.BadParameter(
            f"a slide has {MIN_SPACING_UM:g} to {MAX_SPACING_UM:g} µm per level-0 pixel, got {spacing_um:g}; a 40x "
            "scan has about 0.25"
        )
    return spacing_um


# Checks of a slide's own spacing, under both names of the option.
_CHECKS = {"spacing_um": _plausible_spacing, "slide_spacing_um": _plausible_spacing}


def _field(settings: Any, name: str) -> Field[Any]:
    return next(field for field in fields(settings) if field.name == name)


def _option(field: Field[Any]) -> Any:
    """Return the option that sets a field of a request."""
    asked = asked_of(field)
    return typer.Option(
        asked.flag,
        help=asked.help,
        min=asked.minimum,
        max=asked.maximum,
        callback=_CHECKS.get(field.name),
        show_default=field.default is not MISSING,
    )


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="All of these as YAML, field: value; options on the command line take precedence."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Slide = Annotated[str, typer.Argument(help="A slide file, or its URL.", metavar="SLIDE", show_default=False)]
Slides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Slide files, folders, globs, URLs, or manifests (.csv).", metavar="SLIDE...", show_default=False
    ),
]
Manifest = Annotated[
    Path | None, typer.Option("--manifest", help="A table: slide_id,slide_path[,mask_path][,spacing_um].")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="File of the encoder's weights; by default its hub's.")]
NumHeads = Annotated[
    int | None, typer.Option("--num-heads", min=1, help="Attention heads, for an encoder that is a file of weights.")
]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the code in an encoder's repository.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        help="Instead of --device: a process for each of these, which share the slides: all, 0,1 (GPUs) or cpu:4. By "
        "default one; for many slides on a CPU, unless the model is large, one for each core.",
    ),
]
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="ray runs a process on each GPU of a Ray cluster, or on each CPU where it has none."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="Cluster of --engine ray: HOST:PORT, or auto; by default RAY_ADDRESS, or one started here for the run.",
    ),
]
GpuMemory = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-gib",
        min=0.1,
        help="With --engine ray: GPU memory that a process needs; GPUs are shared by as many as fit.",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory-gib",
        min=0.1,
        help="With --devices: memory that a process needs, by default 0.75; as many are started as fit.",
    ),
]
Impl = Annotated[str | None, typer.Option("--impl", help="Attention implementation; by default the best.")]
Outputs = Annotated[
    Path, typer.Argument(help="A folder of outputs, the --out of infer or demo.", metavar="OUT", show_default=False)
]
SlidesFolder = Annotated[
    Path | None, typer.Option("--slides", help="Folder in which to look for slides that have been moved.")
]
Mask = Annotated[str | None, typer.Option("--mask", help="Your own tissue mask of this slide, at any spacing.")]
Spacing = Annotated[float | None, _option(_field(RunSettings, "spacing_um"))]
CacheDir = Annotated[Path | None, _option(_field(RunSettings, "cache_dir"))]
CacheGb = Annotated[float, _option(_field(RunSettings, "cache_gb"))]
Series = Annotated[int | None, _option(_field(RunSettings, "series"))]
Ink = Annotated[Literal["auto", "off"], _option(_field(RunSettings, "ink"))]
Force = Annotated[bool, _option(_field(RunSettings, "force"))]
MaskValues = Annotated[list[int] | None, _option(_field(RunSettings, "mask_values"))]
MaskClasses = Annotated[list[str] | None, _option(_field(RunSettings, "mask_classes"))]
Roi = Annotated[Path | None, _option(_field(RunSettings, "roi"))]
RoiClasses = Annotated[list[str] | None, _option(_field(RunSettings, "roi_classes"))]
Exclude = Annotated[Path | None, _option(_field(RunSettings, "exclude"))]
ExcludeClasses = Annotated[list[str] | None, _option(_field(RunSettings, "exclude_classes"))]


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter ``settings`` by an option for each of its fields."""
    signature = inspect.signature(command, eval_str=True)
    kind = signature.parameters["settings"].annotation
    asked_for = {field.name: field for field in fields_of(kind)}
    types = get_type_hints(kind)

    @functools.wraps(command)
    def filled(**given: Any) -> None:
        settings = kind(**{name: _value(field, given.pop(name)) for name, field in asked_for.items()})
        command(settings=settings, **given)

    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name == "settings":
            options = [_parameter(field, types[field.name]) for field in asked_for.values()]
        else:
            options = [parameter]
        parameters += (option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options)
    filled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # of functions, too
    filled.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return filled


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    """Return a field of a request as the parameter of a command; that of a bool is whether the option was given."""
    default = field.default if asked_of(field).default is ... else asked_of(field).default
    if kind is bool:
        default = False
    kind = {tuple[int, ...] | None: list[int] | None, tuple[str, ...] | None: list[str] | None}.get(kind, kind)
    if default is MISSING:
        default = inspect.Parameter.empty
    annotation = Annotated[kind, _option(field)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(field: Field[Any], given: Any) -> Any:
    """Return the field's value for a value of its option."""
    if isinstance(field.default, bool):
        return field.default ^ given
    if isinstance(given, list):
        return tuple(given) or None
    return given
