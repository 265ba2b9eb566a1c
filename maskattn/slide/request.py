"""What a run was asked for: refused where a part of it would have no effect, and recorded as it was carried out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskattn.errors import ManifestError
from maskattn.slide.manifest import SlideJob
from maskattn.slide.slide_run import RunSettings

__all__ = ["check_request", "finds_tissue", "masking_of"]


def check_request(jobs: Sequence[SlideJob], settings: RunSettings, model_masked: bool = True) -> None:
    """Refuse masks that nobody would look at, labels of masks that nobody gave, and ink where no tissue is sought.

    Args:
        jobs: the slides.
        settings: how they are to be run.
        model_masked: whether the model leaves background out; True where that is not known yet.

    Raises:
        ManifestError: part of the request would have no effect.
    """
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
    if settings.ink == "off" and not any(finds_tissue(job, settings, model_masked) for job in jobs):
        why = "every slide has a mask" if settings.masked and model_masked else "glass is attended to too"
        raise ManifestError(
            f"--ink says how tissue is found, got --ink off where none is sought: {why}; leave --ink out"
        )


def finds_tissue(job: SlideJob, settings: RunSettings, model_masked: bool) -> bool:
    """Whether the slide's tissue is sought: not where it is given, nor where glass is attended to too."""
    return settings.masked and model_masked and job.mask_path is None


def masking_of(job: SlideJob, settings: RunSettings, model_masked: bool) -> dict[str, Any]:
    """How a slide's background is left out, as ``prediction.json`` records it: a mask only where it is looked at."""
    masked = settings.masked and model_masked
    mask_path = job.mask_path if masked else None
    values = settings.mask_values if mask_path is not None else None
    return {
        "masked": masked,
        "mask": None if mask_path is None else mask_path.name,
        "mask_values": None if values is None else list(values),
    }
