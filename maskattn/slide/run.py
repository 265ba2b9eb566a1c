"""Predict many slides, and skip those that an earlier run finished (``each_slide.py`` contains the loop)."""

from __future__ import annotations

from collections.abc import Sequence

from maskattn.errors import ManifestError, SlideError
from maskattn.nn.inference_linear import packed_weights
from maskattn.nn.slide_model import SlideModel
from maskattn.nn.slide_models.two_stage import TwoStageModel, two_stages
from maskattn.slide.asked import recorded_fields
from maskattn.slide.batch_sizes import check_tokens_of
from maskattn.slide.each_slide import OnTiles, RunProgress, run_each
from maskattn.slide.fleet.claims import Claim
from maskattn.slide.manifest import SlideJob
from maskattn.slide.outlines.rules import check_region_classes
from maskattn.slide.output_folder import clear_leftovers, find_finished, may_be_finished, sweep
from maskattn.slide.overlap import tilings_of
from maskattn.slide.packed_meanwhile import packed_meanwhile
from maskattn.slide.pipeline import identify_model, predict_slide
from maskattn.slide.prediction import EqualParts, ModelIdentity, SlideOutcome, SlidePrediction
from maskattn.slide.request import RunSettings, check_request, differences
from maskattn.slide.run_scale import draw_on_one_scale

__all__ = ["RunProgress", "run_slides"]


def run_slides(
    jobs: Sequence[SlideJob],
    model: SlideModel | TwoStageModel,
    settings: RunSettings,
    progress: RunProgress[SlideOutcome] | None = None,
) -> list[SlideOutcome]:
    """Predict slides, skip those that an earlier run finished, and keep ``settings.out_dir/summary.csv``.

    Processes with the same output folder and settings share the slides.

    Args:
        jobs: the slides, with distinct ids.
        model: the slide model, or an encoder and a slide head, on the device to use.
        settings: how to run the slides.
        progress: called at every step.

    Returns:
        The outcomes in the order of the jobs; with a limit, only those of the slides that were run. A failed slide is
        an outcome, not an exception.

    Raises:
        ManifestError: settings contradict each other or the model, or one would have no effect.
        OutputError: the output folder, or its summary, cannot be written.
    """
    model = two_stages(model)
    check_request(jobs, settings, model.leaves_out)
    check_tokens_of(settings, model.encoder)
    check_region_classes(settings.regions, model.config.classes)
    if settings.overlap and model.encoder is not None:
        tilings_of(settings.overlap, model.encoder.tile_px // model.token_px)
    if settings.features_dir is None and model.why_no_tiles:
        raise ManifestError(model.why_no_tiles)
    if settings.attention == "rollout" and not model.head.has_layers:
        raise ManifestError(
            f"--attention rollout needs layers of attention whose weights sum to 1, got {model.card.name} "
            f"({model.head.kind}), {model.head.why_no_rollout}; use --attention last"
        )
    with packed_weights(model):
        return _predict(jobs, model, settings, _identified(model, settings), progress)


def _identified(model: TwoStageModel, settings: RunSettings) -> ModelIdentity:
    """Return the model's identity, and pack its encoder's weights meanwhile unless no slide may be encoded."""
    if settings.features_dir is not None or may_be_finished(settings.out_dir, settings.overwrite):
        return identify_model(model)
    return packed_meanwhile(lambda: identify_model(model), model.encoder, masked=model.masks_tokens)


def _predict(
    jobs: Sequence[SlideJob],
    model: TwoStageModel,
    settings: RunSettings,
    identity: ModelIdentity,
    progress: RunProgress[SlideOutcome] | None,
) -> list[SlideOutcome]:
    parts = EqualParts()

    def finished(job: SlideJob, claim: Claim | None) -> SlidePrediction | None:
        if claim is not None:
            clear_leftovers(settings.out_dir, job.slide_id, claim.ended)
        found = find_finished(settings.out_dir, job.slide_id)
        if found is None or settings.overwrite:
            return None
        _check_same_request(found, job, model, identity, settings)
        return parts.shared(found)

    def predict(job: SlideJob, claim: Claim, on_tiles: OnTiles | None) -> SlidePrediction:
        return parts.shared(predict_slide(job, model, settings, on_tiles, identity, claim))

    def draw_together(outcomes: list[SlideOutcome]) -> None:
        if settings.scale == "run":
            draw_on_one_scale(settings.out_dir / one.slide_id for one in outcomes if one.status != "failed")

    return run_each(
        jobs,
        settings.out_dir,
        SlideOutcome,
        finished,
        predict,
        progress,
        sharing=settings.sharing,
        cache=settings.cache,
        request=f"{identity} {recorded_fields(settings)}",
        sweep=lambda: sweep(settings.out_dir),
        at_end=draw_together,
    )


def _check_same_request(
    finished: SlidePrediction, job: SlideJob, model: TwoStageModel, identity: ModelIdentity, settings: RunSettings
) -> None:
    """Refuse to skip a slide whose outputs are those of another request."""
    spacing_um = settings.spacing_um or job.spacing_um or finished.slide.spacing_um
    found_and_asked = [
        ("model", f"{finished.model.name} {finished.model.sha256}", f"{identity.name} {identity.sha256}"),
        *finished.slide.identity(job),
        ("spacing_um", finished.slide.spacing_um, spacing_um),
    ]
    other = [(name, found, asked) for name, found, asked in found_and_asked if found != asked]
    for name, found, asked in (*other, *differences(finished, job, settings, model.leaves_out)):
        raise SlideError(
            f"a finished slide must have been run as asked, got {name}: {found} in {settings.out_dir / job.slide_id} "
            f"and asked for {asked}; run it again with --overwrite or choose another --out"
        )
