"""Pipeline: a slide in; a prediction, features, relevance and heat maps out.

reader → tissue → grid → stream of tiles → tile encoder on packed tokens → slide encoder: scores, relevance of tiles
→ (where asked) a second stream for the relevance of tokens → outputs. Memory is bounded by the batch size and the
thumbnail, apart from the O(tiles) embeddings and masks; token maps go to the file batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskattn.errors import SlideError, quoted
from maskattn.explain.hierarchical import HierarchicalCDAM, RelevanceMap
from maskattn.explain.map_check import MapCheck, check_tokens
from maskattn.explain.methods import METHODS
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.manifest import SlideJob
from maskattn.slide.output_folder import slide_folder
from maskattn.slide.prediction import ModelIdentity, SlideCounts, SlideFile, SlidePrediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.request import RunSettings, finds_tissue, recorded
from maskattn.slide.slide_run import EncodedTiles, SlideRun, Stages
from maskattn.slide.tile_loop import encode_tiles, feed_sinks
from maskattn.slide.tissue import TissueMask, find_tissue, limit_tissue, load_mask
from maskattn.slide.tissue.bright_field import require_bright_field
from maskattn.slide.versions import installed_versions

__all__ = ["RunSettings", "SlideJob", "SlidePrediction", "identify_model", "predict_slide"]


def predict_slide(
    job: SlideJob,
    model: SlideModel,
    settings: RunSettings,
    on_tiles: Callable[[int, int], None] | None = None,
    identity: ModelIdentity | None = None,
) -> SlidePrediction:
    """Predict one slide and write its outputs to ``settings.out_dir/<slide_id>/``, whole or not at all.

    Args:
        job: the slide.
        model: the slide model, on the device to use.
        settings: how to run it.
        on_tiles: called with (tiles done, tiles to do) after every batch.
        identity: ``identify_model(model)``, where the caller has it: it reads every weight.

    Returns:
        The prediction, as ``prediction.json`` has it.

    Raises:
        SlideError: the slide, or its mask, cannot be used; the message says the rule, what came and the remedy.
        OSError: the outputs cannot be written.
    """
    if job.problem is not None:
        raise SlideError(job.problem)
    identity = identity or identify_model(model)
    stages = Stages(model.device)
    with stages("open"):
        given = (job.spacing_um, "manifest") if settings.spacing_um is None else (settings.spacing_um, "override")
        reader = SlideReader(job.path, *given, series=settings.series, isolated=True)
    with reader, slide_folder(settings.out_dir, job.slide_id) as folder:
        run = SlideRun(job, model, settings, reader, stages, on_tiles)
        prediction = _predict(run, identity, folder)
        prediction.write(folder / "prediction.json")
    return prediction


def identify_model(model: SlideModel) -> ModelIdentity:
    """Which model it is, as outputs name it."""
    config = model.config
    return ModelIdentity(config.name, model.identity()[:16], config.classes, config.demonstration, config.note)


def _predict(run: SlideRun, identity: ModelIdentity, folder: Path) -> SlidePrediction:
    """Every stage of a slide, in order."""
    model, stages = run.model, run.stages
    with stages("tissue"):
        tissue = _limited(run, _find_or_load_tissue(run))
    with stages("grid"):
        grid = _lay_grid(run, tissue)
    encoded = encode_tiles(run, grid)
    with stages("slide"):
        explain = HierarchicalCDAM(model, run.settings.method)
        relevance = explain.tiles(encoded.embeddings_TC, encoded.keep_HW.to(run.device), gradient=run.settings.tokens)
    logits_K = relevance.logits_K.float().cpu()
    if not bool(logits_K.isfinite().all()):
        raise SlideError(f"a model's scores must be finite, got {logits_K.tolist()}; check the model's weights")
    scores = dict(zip(model.config.classes, logits_K.softmax(dim=0).tolist(), strict=True))
    checks: dict[str, MapCheck] = {}
    if run.settings.check:
        with stages("check"):
            checks = _check_maps(run, encoded, relevance)
    feed_sinks(folder, run, grid, encoded, relevance, scores, checks)
    prediction = _prediction(run, identity, tissue, grid, encoded, logits_K, scores)
    return replace(prediction, maps=_describe_maps(run, relevance, checks))


def _check_maps(run: SlideRun, encoded: EncodedTiles, relevance: RelevanceMap) -> dict[str, MapCheck]:
    """Class → the test of its map of tiles."""
    encoder, keep_HW = run.model.slide_encoder, encoded.keep_HW.to(run.device)
    with torch.inference_mode():
        tokens = run.model.slide_tokens(encoded.embeddings_TC, keep_HW)
        maps_KN = torch.zeros(len(relevance.relevance_KT), keep_HW.numel(), device=run.device)
        maps_KN[:, keep_HW.flatten()] = relevance.relevance_KT.float()
        checks = check_tokens(encoder, tokens, "all", maps_KN)
    return dict(zip(run.model.config.classes, checks, strict=True))


def _describe_maps(run: SlideRun, relevance: RelevanceMap, checks: dict[str, MapCheck]) -> dict[str, dict[str, Any]]:
    """Class → what is known of its map: by which method, what it sums to, whether it passed its test."""
    sums = relevance.sums
    described: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(run.model.config.classes):
        described[name] = {"method": METHODS[run.settings.method].title}
        if sums is not None:
            described[name] |= {
                "sum_of_tiles": float(relevance.relevance_KT[index].sum()),
                "on_class_token": float(sums.prefix_K[index]),
                "score_less_baseline": float(sums.difference_K[index]),
                "gap": float(sums.gap_K[index]),
            }
        described[name] |= checks[name].as_json() if name in checks else {"map_check": "not asked for"}
    return described


def _find_or_load_tissue(run: SlideRun) -> TissueMask | None:
    """The tissue, or None where the run attends to all of the slide."""
    settings, model_masked = run.settings, run.model.config.masked
    if finds_tissue(run.job, settings, model_masked):
        return find_tissue(run.reader, ink=settings.ink, force=settings.force)
    if not settings.force:
        require_bright_field(run.reader)
    if run.job.mask_path is None or not (settings.masked and model_masked):
        return None
    classes = settings.mask_classes
    return load_mask(run.job.mask_path, run.info, settings.mask_values, tissue_classes=classes, reader=run.reader)


def _limited(run: SlideRun, tissue: TissueMask | None) -> TissueMask | None:
    """The tissue within the region of interest, and without what is excluded."""
    if tissue is None:
        return None
    settings = run.settings
    roi, exclude = (settings.roi, settings.roi_classes), (settings.exclude, settings.exclude_classes)
    return limit_tissue(tissue, run.info, run.job.slide_id, roi, exclude)


def _lay_grid(run: SlideRun, tissue: TissueMask | None) -> TokenGrid:
    config = run.model.config
    grid = make_grid(
        run.info,
        tissue,
        tile_px=config.tile_px,
        token_px=config.token_px,
        spacing_um=config.spacing_um,
        min_token_fraction=config.min_token_fraction,
        masked=tissue is not None,
    )
    if tissue is not None and grid.kept_tiles == 0:
        raise SlideError(_without_tissue(run, tissue))
    return grid


def _without_tissue(run: SlideRun, tissue: TissueMask) -> str:
    """Why no tile is left, and what to do about it: another thing where the user gave a mask."""
    mask_path = run.job.mask_path
    notes = f" ({'; '.join(tissue.notes)})" if tissue.notes else ""
    if mask_path is None:
        by, given = tissue.method, ""
        remedy = "where there is tissue, name it in a mask of your own (--mask, or mask_path in a manifest)"
    else:
        by, given = f"the mask {mask_path}", f" --mask {quoted(mask_path)}"
        remedy = "correct the mask, or name the labels or classes that mean tissue (--mask-value, --mask-class)"
    what = f"none by {by} in {run.job.path}{notes}"
    if tissue.mask_HW.any():
        token_um = run.model.config.token_px * run.model.config.spacing_um
        what = f"too little by {by} in {run.job.path} to fill a token of {token_um:g} µm{notes}"
    return (
        f"a slide must show tissue, got {what}; look at it with `maskattn tissue {quoted(run.job.path)}{given}` and "
        f"{remedy}"
    )


def _prediction(
    run: SlideRun,
    identity: ModelIdentity,
    tissue: TissueMask | None,
    grid: TokenGrid,
    encoded: EncodedTiles,
    logits_K: Tensor,
    scores: dict[str, float],
) -> SlidePrediction:
    info, config = run.info, run.model.config
    return SlidePrediction(
        slide_id=run.job.slide_id,
        prediction=max(scores, key=scores.__getitem__),
        scores=scores,
        logits=dict(zip(config.classes, logits_K.tolist(), strict=True)),
        model=identity,
        slide=SlideFile(
            path=str(run.job.path),
            bytes=run.job.path.stat().st_size,
            vendor=info.vendor,
            width_px=info.width_px,
            height_px=info.height_px,
            spacing_um=info.spacing_um,
            spacing_source=info.spacing_source,
            objective_power=info.objective_power,
            reader=info.reader,
        ),
        tissue=_describe(tissue),
        settings={
            "tile_px": config.tile_px,
            "token_px": config.token_px,
            "spacing_um": config.spacing_um,
            "min_token_fraction": config.min_token_fraction,
            **recorded(run.job, run.settings, config.masked),
            "workers": run.workers,
            "device": str(run.device),
        },
        counts=SlideCounts(
            cells=grid.cells,
            kept_tiles=grid.kept_tiles,
            kept_tokens=grid.kept_tokens,
            skipped_tokens=grid.skipped_tokens,
            unreadable_tiles=grid.kept_tiles - len(encoded.rows_T),
        ),
        notes=_notes(run, tissue, encoded),
        timings_s={name: round(seconds, 4) for name, seconds in run.stages.seconds.items()},
        versions=installed_versions(),
    )


def _notes(run: SlideRun, tissue: TissueMask | None, encoded: EncodedTiles) -> tuple[str, ...]:
    """What the user should know of how the slide was read, beyond the notes on its tissue."""
    told = () if tissue is None else tissue.notes
    notes = [note for note in run.reader.notes if note not in told]
    if encoded.reason is not None:
        notes.append(f"tiles were left out that cannot be read; the first because {encoded.reason}")
    return tuple(notes)


def _describe(tissue: TissueMask | None) -> dict[str, Any]:
    if tissue is None:
        return {"method": "none: all of the slide takes part", "fraction": 1.0, "notes": []}
    return {"method": tissue.method, "fraction": float(tissue.tissue_fraction), "notes": list(tissue.notes)}
