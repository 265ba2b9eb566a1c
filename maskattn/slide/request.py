"""What a run is asked for: one dataclass, whose fields say how the other rooms treat them (``asked.py``)."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskattn.errors import ManifestError
from maskattn.explain.methods import DEFAULT_METHOD, METHODS, method_named
from maskattn.slide.asked import asked, recorded_fields, unlike
from maskattn.slide.outlines.rules import check_areas, check_outlines
from maskattn.slide.overlap import check_overlap
from maskattn.slide.pyramids.rules import check_pyramids
from maskattn.slide.shared_requests import SharedSettings, slide_spacing

if TYPE_CHECKING:
    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.prediction import SlidePrediction

__all__ = ["RunSettings", "check_request", "differences", "finds_tissue", "recorded"]


def _has_output(found: Any, asked: Any) -> bool:
    """Whether a finished slide has an output that may be asked for: one more than was asked for does no harm."""
    return found == "both" or asked in (None, "off", found)


@dataclass(frozen=True)
class RunSettings(SharedSettings):
    """How slides are run: beside what :class:`SharedSettings` says, this.

    Attributes:
        out_dir: each slide's outputs go to ``out_dir/<slide_id>/``.
        masked: False attends to glass too, for comparison.
        tokens: also make relevance maps at the resolution of tokens, in a second pass over the slide.
        method: of explanation; see :data:`maskattn.explain.METHODS`.
        check: test each map by what the model makes of the tiles that it calls most and least relevant.
        attention: of the slide model, as it is mapped: "last", what its last layer or pooling reads with; "rollout",
            that carried down through all of its layers, in time quadratic in the tiles.
        spacing_um: µm per level-0 pixel of every slide, in place of what manifest and files say.
        overwrite: run finished slides again.
        geojson: "tiles" or "tokens" writes them as QuPath's objects, "off" neither.
        features_dir: folder of features of the slides' tiles, whatever tool wrote them, in place of encoding them.
        other_encoder: go on where encoder, spacing or token mask are not what the slide model was trained with.
        regions: CLASS=VALUE or CLASS=PERCENT% each: where a class's relevance is so high, ``relevance.geojson`` has an
            annotation.
        ome_tiff: "values", "colours" or "both" writes each map as a pyramid on level 0, "off" none.
        zarr: write the maps as OME-Zarr.
        scale: of the pictures' colours; "slide" = each slide's own, "run" = one for each class on all slides of a run.
        smooth: draw the pictures without steps between tiles or tokens; tables and other files have the steps.
        overlap: the share of its side by which a tile overlaps the next where maps of tokens are made, 1 − 1/n for n²
            tilings, whose maps are averaged; scores and features are those of tiles side by side.
    """

    out_dir: Path = field(
        metadata=asked("--out", "Folder of outputs; made if it is not there.", recorded=False, serves=None)
    )
    _: KW_ONLY
    masked: bool = field(default=True, metadata=asked("--no-mask", "Attend to glass too, for comparison."))
    tokens: bool = field(
        default=False,
        # A slide that was run with tokens has all that one without them has.
        metadata=asked("--tokens", "Relevance of tokens too; reads each slide twice.", serves=operator.ge),
    )
    method: str = field(
        default=DEFAULT_METHOD,
        metadata=asked(
            "--method",
            f"Of explanation: {', '.join(name for name, method in METHODS.items() if method.levels)}.",
            before="cdam",
        ),
    )
    check: bool = field(
        default=True,
        # A slide whose maps were tested has all that one without the test has.
        metadata=asked(
            "--no-check",
            "Do not test the maps by showing the model what they call relevant.",
            before=False,
            serves=operator.ge,
        ),
    )
    attention: Literal["last", "rollout"] = field(
        default="last",
        metadata=asked("--attention", "Of the slide model, as mapped: last, its last row; or rollout, of all layers."),
    )
    spacing_um: float | None = field(default=None, metadata=slide_spacing("--spacing-um"))
    overwrite: bool = field(
        default=False, metadata=asked("--overwrite", "Run finished slides again.", recorded=False, serves=None)
    )
    features_dir: Path | None = field(
        default=None,
        metadata=asked("--features", "Folder of features of TRIDENT, CLAM, STAMP, slide2vec, AtlasPatch or extract."),
    )
    other_encoder: bool = field(
        default=False,
        # A slide that passed without it passes with it too.
        metadata=asked(
            "--other-encoder",
            "Go on with another encoder, spacing or token mask than the slide model was trained with.",
            serves=operator.le,
        ),
    )
    geojson: Literal["off", "tiles", "tokens"] = field(
        default="off",
        metadata=asked("--geojson", "relevance.geojson for QuPath: off, tiles or tokens.", serves=_has_output),
    )
    regions: tuple[str, ...] | None = field(
        default=None,
        metadata=asked(
            "--region",
            "CLASS=VALUE or CLASS=PERCENT%: annotate where relevance is so high (may be repeated).",
            serves=_has_output,
        ),
    )
    ome_tiff: Literal["off", "values", "colours", "both"] = field(
        default="off",
        metadata=asked(
            "--ome-tiff", "Each map as a pyramid on level 0: off, values, colours or both.", serves=_has_output
        ),
    )
    zarr: bool = field(
        default=False,
        metadata=asked("--zarr", "The maps as OME-Zarr, relevance.zarr; needs maskattn[zarr].", serves=operator.ge),
    )
    scale: Literal["slide", "run"] = field(
        default="slide",
        metadata=asked("--scale", "Of the pictures' colours: slide, or run for one scale on all of a run's slides."),
    )
    smooth: bool = field(
        default=False,
        metadata=asked("--smooth", "Draw the PNGs without steps between tiles or tokens; no table changes."),
    )
    overlap: float = field(
        default=0.0,
        metadata=asked(
            "--overlap",
            "Average the maps of tokens over tilings that overlap by this share of a tile's side: 0.5 takes 4 times as "
            "long, 0.75 takes 16 times.",
            minimum=0,
            maximum=1,
        ),
    )


def check_request(jobs: Sequence[SlideJob], settings: RunSettings, model_masked: bool = True) -> None:
    """Refuse masks that nobody would look at, labels of masks that nobody gave, and ink where no tissue is sought.

    Args:
        jobs: the slides.
        settings: how they are to be run.
        model_masked: whether the model leaves background out; True where that is not known yet.

    Raises:
        ManifestError: some of what was asked for would have no effect.
        ValueError: there is no such method of explanation for slide models.
    """
    method_named(settings.method, levels=True)
    check_outlines(settings)
    check_pyramids(settings)
    check_overlap(settings)
    _check_features(jobs, settings)
    given = [job for job in jobs if job.mask_path is not None]
    if given and not (settings.masked and model_masked):
        who = (
            "this model attends to all of a slide, masks or not"
            if settings.masked
            else "--no-mask attends to glass too"
        )
        raise ManifestError(
            f"{who}, so a mask would have no effect, got {given[0].mask_path} for {given[0].slide_id!r}"
            + (f" and {len(given) - 1} more" if len(given) > 1 else "")
            + "; leave out --mask and the manifest's mask_path"
            + ("" if settings.masked else ", or --no-mask")
        )
    if settings.mask_values is not None and not given:
        raise ManifestError(
            f"--mask-value names labels of a mask, got {', '.join(map(str, settings.mask_values))} and no mask; "
            "give one with --mask or the manifest's mask_path, or leave the values out"
        )
    masked = settings.masked and model_masked
    why = None if masked else "where all of a slide is attended to; leave it out, or --no-mask"
    check_areas(settings, with_mask=bool(given), without_effect=why)
    if settings.ink == "off" and not any(finds_tissue(job, settings, model_masked) for job in jobs):
        why = "every slide has a mask" if settings.masked and model_masked else "glass is attended to too"
        raise ManifestError(
            f"--ink says how tissue is found, got --ink off where none is sought: {why}; leave --ink out"
        )


def _check_features(jobs: Sequence[SlideJob], settings: RunSettings) -> None:
    """Refuse a choice of tiles where features say which there are, and maps of what cannot be read."""
    if settings.features_dir is None:
        return
    given = {
        "--mask": next((job.mask_path for job in jobs if job.mask_path is not None), None),
        "--roi": settings.roi,
        "--exclude": settings.exclude,
        "--no-mask": None if settings.masked else "glass",
    }
    beside = [f"{flag} ({value})" for flag, value in given.items() if value is not None]
    if beside:
        raise ManifestError(
            f"features say which tiles take part, got {', '.join(beside)} beside --features {settings.features_dir}; "
            "leave one of them out"
        )


def finds_tissue(job: SlideJob, settings: RunSettings, model_masked: bool) -> bool:
    """Whether the slide's tissue is sought: not where it is given, nor where glass is attended to too."""
    return settings.masked and model_masked and job.mask_path is None


def recorded(job: SlideJob, settings: RunSettings, model_masked: bool) -> dict[str, Any]:
    """The request for a slide as ``prediction.json`` has it: as it was carried out, a mask only where it is looked at.

    Args:
        job: the slide.
        settings: how it is run.
        model_masked: whether the model leaves background out.
    """
    masked = settings.masked and model_masked
    mask_path = job.mask_path if masked else None
    values, classes = (settings.mask_values, settings.mask_classes) if mask_path is not None else (None, None)
    record = recorded_fields(settings)
    # Rebuilt so that the mask stands after what it depends on.
    carried_out = {"masked": masked, "mask": None if mask_path is None else mask_path.name}
    if settings.features_dir is not None:
        record["features_dir"] = str(settings.features_dir.resolve())
    labels = {"mask_values": values, "mask_classes": classes}
    told = {name: None if given is None else list(given) for name, given in labels.items()}
    return {**carried_out, **record, "masked": masked, **told}


def differences(
    finished: SlidePrediction, job: SlideJob, settings: RunSettings, model_masked: bool
) -> Iterator[tuple[str, Any, Any]]:
    """The settings in which a finished slide differs from the request: (name, what was found, what is asked for).

    What an earlier version did not record was not asked for then, and has its default, or what was done before.

    Args:
        finished: the prediction of the earlier run.
        job: the slide.
        settings: how it is to be run now.
        model_masked: whether the model leaves background out.
    """
    for name, found, wanted in unlike(finished.settings, recorded(job, settings, model_masked), settings):
        if name != "ink" or finds_tissue(job, settings, model_masked):
            yield name, found, wanted
