"""The request for a run of slides; see ``asked.py`` for the metadata of its fields."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskattn.errors import ManifestError
from maskattn.explain.methods import DEFAULT_METHOD, METHODS, method_named
from maskattn.slide.asked import asked, recorded_fields, unlike
from maskattn.slide.batch_sizes import check_batches
from maskattn.slide.outlines.rules import check_areas, check_outlines
from maskattn.slide.overlap import check_overlap
from maskattn.slide.pyramids.rules import check_pyramids
from maskattn.slide.shared_requests import SharedSettings, slide_spacing

if TYPE_CHECKING:
    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.prediction import SlidePrediction

__all__ = ["RunSettings", "check_request", "differences", "finds_tissue", "recorded"]


def _has_output(found: Any, asked: Any) -> bool:
    """Return whether a finished slide has the requested output; outputs beyond the request do no harm."""
    return found == "both" or asked in (None, "off", found)


@dataclass(frozen=True)
class RunSettings(SharedSettings):
    """How slides are run, in addition to :class:`SharedSettings`.

    Attributes:
        out_dir: the output folder; each slide's outputs are in ``out_dir/<slide_id>/``.
        masked: False attends to glass too, for comparison.
        tokens: also make relevance maps at the resolution of tokens, in a second pass over the slide.
        method: the method of explanation; see :data:`maskattn.explain.METHODS`.
        check: test each map by the model's scores for the tiles that it ranks as most and least relevant.
        attention: the slide model's attention map: "last", the attention of its last layer or pooling; "rollout", the
            attention rolled out over all of its layers, in time quadratic in the number of tiles.
        spacing_um: µm per level-0 pixel of every slide; overrides manifest and metadata.
        overwrite: run finished slides again.
        geojson: "tiles" or "tokens" writes them as QuPath objects; "off" writes neither.
        features_dir: a folder of tile features in any known layout, which are used instead of encoding the tiles.
        other_encoder: accept features whose encoder, spacing or token mask differs from the slide model's training.
        regions: CLASS=VALUE or CLASS=PERCENT% each; areas where the class's relevance is at least so high become
            annotations in ``relevance.geojson``.
        ome_tiff: "values", "colours" or "both" writes each map as a pyramid aligned with level 0; "off" writes none.
        zarr: write the maps as OME-Zarr.
        scale: the scale of the pictures' colours; "slide" = one for each slide and class, "run" = one for each class
            over all slides of a run.
        smooth: draw the pictures without steps between tiles or tokens; tables and other files are not smoothed.
        overlap: the fraction of its side by which a tile overlaps the next for token maps, 1 − 1/n for n² tilings,
            whose maps are averaged; scores and features come from tiles that do not overlap.
    """

    out_dir: Path = field(
        metadata=asked("--out", "Output folder; created if it does not exist.", recorded=False, serves=None)
    )
    _: KW_ONLY
    masked: bool = field(default=True, metadata=asked("--no-mask", "Attend to glass too, for comparison."))
    tokens: bool = field(
        default=False,
        # A run with tokens has all outputs of a run without.
        metadata=asked("--tokens", "Also make token maps, which reads each slide twice.", serves=operator.ge),
    )
    method: str = field(
        default=DEFAULT_METHOD,
        metadata=asked(
            "--method",
            f"Method of explanation: {', '.join(name for name, method in METHODS.items() if method.levels)}.",
            before="cdam",
        ),
    )
    check: bool = field(
        default=True,
        # A run with the test has all outputs of a run without.
        metadata=asked(
            "--no-check",
            "Do not test the maps by the model's scores for their most and least relevant tiles.",
            before=False,
            serves=operator.ge,
        ),
    )
    attention: Literal["last", "rollout"] = field(
        default="last",
        metadata=asked(
            "--attention", "Slide model's attention map: last (its last layer), or rollout over all layers."
        ),
    )
    spacing_um: float | None = field(default=None, metadata=slide_spacing("--spacing-um"))
    overwrite: bool = field(
        default=False, metadata=asked("--overwrite", "Run finished slides again.", recorded=False, serves=None)
    )
    features_dir: Path | None = field(
        default=None,
        metadata=asked(
            "--features",
            "Folder of tile features from TRIDENT, CLAM, STAMP, slide2vec, AtlasPatch or maskattn extract.",
        ),
    )
    other_encoder: bool = field(
        default=False,
        # A slide that passed without it passes with it too.
        metadata=asked(
            "--other-encoder",
            "Accept another encoder, spacing or token mask than the slide model was trained with.",
            serves=operator.le,
        ),
    )
    geojson: Literal["off", "tiles", "tokens"] = field(
        default="off",
        metadata=asked("--geojson", "Write relevance.geojson for QuPath: off, tiles or tokens.", serves=_has_output),
    )
    regions: tuple[str, ...] | None = field(
        default=None,
        metadata=asked(
            "--region",
            "CLASS=VALUE or CLASS=PERCENT%: annotate areas of at least that relevance (may be repeated).",
            serves=_has_output,
        ),
    )
    ome_tiff: Literal["off", "values", "colours", "both"] = field(
        default="off",
        metadata=asked(
            "--ome-tiff",
            "Write each map as a pyramid aligned with level 0: off, values, colours or both.",
            serves=_has_output,
        ),
    )
    zarr: bool = field(
        default=False,
        metadata=asked(
            "--zarr", "Write the maps as OME-Zarr, relevance.zarr; needs maskattn[zarr].", serves=operator.ge
        ),
    )
    scale: Literal["slide", "run"] = field(
        default="slide",
        metadata=asked("--scale", "Colour scale of the pictures: slide (one each), or run (one for all slides)."),
    )
    smooth: bool = field(
        default=False,
        metadata=asked("--smooth", "Draw the PNGs without steps between tiles or tokens; tables are not smoothed."),
    )
    overlap: float = field(
        default=0.0,
        metadata=asked(
            "--overlap",
            "Average token maps over tilings that overlap by this fraction of a tile's side: 0.5 takes 4 times as "
            "long, 0.75 takes 16 times as long.",
            minimum=0,
            maximum=1,
        ),
    )


def check_request(jobs: Sequence[SlideJob], settings: RunSettings, model_masked: bool = True) -> None:
    """Refuse settings that contradict each other or would have no effect.

    Args:
        jobs: the slides.
        settings: the request.
        model_masked: whether the model leaves background out; True if that is not known yet.

    Raises:
        ManifestError: settings contradict each other, or one would have no effect.
        ValueError: the method of explanation is unknown, or does not work for slide models.
    """
    method_named(settings.method, levels=True)
    check_batches(settings)
    check_outlines(settings)
    check_pyramids(settings)
    check_overlap(settings)
    _check_features(jobs, settings)
    given = [job for job in jobs if job.mask_path is not None]
    if given and not (settings.masked and model_masked):
        who = "this model attends to the whole slide" if settings.masked else "--no-mask attends to glass too"
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
    why = None if masked else "when the model attends to the whole slide; leave it out, or --no-mask"
    check_areas(settings, with_mask=bool(given), without_effect=why)
    if settings.ink == "off" and not any(finds_tissue(job, settings, model_masked) for job in jobs):
        why = "every slide has a mask" if settings.masked and model_masked else "glass is attended to too"
        raise ManifestError(
            f"--ink controls how tissue is segmented, got --ink off where no slide's tissue is: {why}; leave --ink out"
        )


def _check_features(jobs: Sequence[SlideJob], settings: RunSettings) -> None:
    """Refuse masks and outlines if features are given, which determine the tiles."""
    if settings.features_dir is None:
        return
    given = {
        "--mask": next((job.mask_path for job in jobs if job.mask_path is not None), None),
        "--roi": settings.roi,
        "--exclude": settings.exclude,
        "--no-mask": None if settings.masked else "glass",
    }
    conflicting = [f"{flag} ({value})" for flag, value in given.items() if value is not None]
    if conflicting:
        raise ManifestError(
            f"features determine which tiles take part, got {', '.join(conflicting)} with --features "
            f"{settings.features_dir}; leave one of them out"
        )


def finds_tissue(job: SlideJob, settings: RunSettings, model_masked: bool) -> bool:
    """Return whether the slide's tissue is segmented: not if a mask is given, nor if glass takes part too."""
    return settings.masked and model_masked and job.mask_path is None


def recorded(job: SlideJob, settings: RunSettings, model_masked: bool) -> dict[str, Any]:
    """Return the request as ``prediction.json`` records it for a slide; a mask without effect is left out.

    Args:
        job: the slide.
        settings: the request.
        model_masked: whether the model leaves background out.
    """
    masked = settings.masked and model_masked
    mask_path = job.mask_path if masked else None
    values, classes = (settings.mask_values, settings.mask_classes) if mask_path is not None else (None, None)
    record = recorded_fields(settings)
    # The keys come first, so that the mask follows what it depends on.
    carried_out = {"masked": masked, "mask": None if mask_path is None else mask_path.name}
    if settings.features_dir is not None:
        record["features_dir"] = str(settings.features_dir.resolve())
    labels = {"mask_values": values, "mask_classes": classes}
    used = {name: None if given is None else list(given) for name, given in labels.items()}
    return {**carried_out, **record, "masked": masked, **used}


def differences(
    finished: SlidePrediction, job: SlideJob, settings: RunSettings, model_masked: bool
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, found, asked for) for each setting in which a finished slide does not satisfy the request.

    Fields that an earlier version did not record are treated as in :func:`maskattn.slide.asked.unlike`.

    Args:
        finished: the prediction of the earlier run.
        job: the slide.
        settings: the request.
        model_masked: whether the model leaves background out.
    """
    for name, found, wanted in unlike(finished.settings, recorded(job, settings, model_masked), settings):
        if name != "ink" or finds_tissue(job, settings, model_masked):
            yield name, found, wanted
