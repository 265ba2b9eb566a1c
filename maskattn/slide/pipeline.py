"""The pipeline from a slide to its prediction, features, relevance and heat maps.

reader → tissue → tiles → stream of tiles → tile encoder (or given features) → slide head: scores, relevance of tiles →
(if requested) a second stream for the relevance of tokens → outputs. Memory is bounded by the batch size and the
thumbnail, apart from the O(tiles) embeddings and masks; token maps are written batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.explain.hierarchical import RelevanceMap
from maskattn.explain.map_check import MapCheck, check_maps, check_tokens
from maskattn.explain.methods import METHODS
from maskattn.explain.slide_heads import SlideHeadCDAM
from maskattn.nn.slide_model import SlideModel, SlideModelConfig
from maskattn.nn.slide_models.head import SlideHead, TileGrid
from maskattn.nn.slide_models.two_stage import TwoStageModel, two_stages
from maskattn.nn.slide_models.vit import ViTHead
from maskattn.slide.fleet.claims import Claim
from maskattn.slide.manifest import SlideJob
from maskattn.slide.opened_ahead import open_slide
from maskattn.slide.output_folder import slide_folder
from maskattn.slide.prediction import ModelIdentity, SlideCounts, SlideFile, SlidePrediction
from maskattn.slide.request import RunSettings, recorded
from maskattn.slide.run_tiles import RunTiles, find_run_tiles
from maskattn.slide.slide_run import EncodedTiles, SlideRun, Stages
from maskattn.slide.tile_loop import encode_tiles, feed_sinks
from maskattn.slide.tilings import TilingMeans, averaged_tilings
from maskattn.slide.tissue import TissueMask
from maskattn.slide.unchanged import FileState
from maskattn.slide.versions import installed_versions

# Suffixes of feature files; no slide has them.
_FEATURES = (".h5", ".pt")

__all__ = ["RunSettings", "SlideJob", "SlidePrediction", "identify_model", "predict_slide"]


def predict_slide(
    job: SlideJob,
    model: SlideModel | TwoStageModel,
    settings: RunSettings,
    on_tiles: Callable[[int, int], None] | None = None,
    identity: ModelIdentity | None = None,
    claim: Claim | None = None,
) -> SlidePrediction:
    """Predict one slide and write its outputs to ``settings.out_dir/<slide_id>/``, completely or not at all.

    Args:
        job: the slide; if features are given, its path may be the feature file, and no slide is read.
        model: the slide model, or an encoder and a slide head, on the device to use.
        settings: how to run the slide.
        on_tiles: called with (tiles done, tiles to do) after every batch.
        identity: ``identify_model(model)`` if the caller has it already; computing it reads all weights.
        claim: this process's claim on the slide, if several processes share the output folder.

    Returns:
        The prediction, as written to ``prediction.json``.

    Raises:
        SlideError: the slide, its mask or its features cannot be used, or the slide changed while it ran.
        ClaimLostError: another process took the slide over in the meantime.
        OSError: the outputs cannot be written.
    """
    if job.problem is not None:
        raise SlideError(job.problem)
    identity, model = identity or identify_model(model), two_stages(model)
    stages = Stages(model.device)
    with ExitStack() as opened:
        reader = None
        if settings.features_dir is None or job.path.suffix not in _FEATURES:
            with stages("open"):
                state, reader = open_slide(job, settings.spacing_um, settings.series)
            opened.enter_context(reader)
        else:
            state = FileState.of(job.path)
        folder = opened.enter_context(slide_folder(settings.out_dir, job.slide_id, claim))
        opened.enter_context(state.kept())
        run = SlideRun(job, model, settings, reader, stages, on_tiles)
        prediction = _predict(run, identity, folder)
        prediction.write(folder / "prediction.json")
    return prediction


def identify_model(model: SlideModel | TwoStageModel) -> ModelIdentity:
    """Return the identity of the model that outputs state."""
    config = model.config
    return ModelIdentity(config.name, model.identity()[:16], config.classes, config.demonstration, config.note)


def _predict(run: SlideRun, identity: ModelIdentity, folder: Path) -> SlidePrediction:
    """Run every stage of a slide in order."""
    model, stages = run.model, run.stages
    tiles = find_run_tiles(run)
    encoded = _encoded(run, tiles)
    coords_um_T2, grid = tiles.places(encoded.rows_T)
    explain = SlideHeadCDAM(model.head, model.encoder, run.settings.method)
    with averaged_tilings(run, tiles, encoded, explain, folder) as means:
        with stages("slide"):
            relevance = explain.tiles(
                encoded.embeddings_TC,
                coords_um_T2,
                grid,
                gradient=run.with_tokens,
                rollout=run.settings.attention == "rollout",
            )
            if means is not None:
                relevance = means.add_first(relevance)
        logits_K = relevance.logits_K.float().cpu()
        if not bool(logits_K.isfinite().all()):
            raise SlideError(f"a model's scores must be finite, got {logits_K.tolist()}; check the model's weights")
        scores = dict(zip(model.config.classes, model.scores(logits_K).tolist(), strict=True))
        checks: dict[str, MapCheck] = {}
        if run.settings.check:
            with stages("check"):
                found = _check_maps(model.head, encoded.embeddings_TC, coords_um_T2, grid, relevance.relevance_KT)
                checks = dict(zip(model.config.classes, found, strict=True))
        feed_sinks(folder, run, tiles, encoded, relevance, scores, checks, means)
    prediction = _prediction(run, identity, tiles, encoded, logits_K, scores)
    return replace(prediction, maps=_describe_maps(run, relevance, checks, means))


def _encoded(run: SlideRun, tiles: RunTiles) -> EncodedTiles:
    """Return the tiles' embeddings, encoded or from the given features."""
    if tiles.features is None:
        return encode_tiles(run, tiles.grid)
    embeddings_TC = torch.from_numpy(tiles.features.features_TC).to(run.device, torch.float32)
    return EncodedTiles(embeddings_TC, np.arange(len(embeddings_TC)))


@torch.no_grad()
def _check_maps(
    head: SlideHead, z_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None, relevance_KT: Tensor
) -> list[MapCheck]:
    """Test each class's map of tiles by the head's predictions from subsets of the tiles."""
    if isinstance(head, ViTHead) and grid is not None:
        tokens, _ = head.tokens(z_TC, grid)
        maps_KN = relevance_KT.new_zeros(len(relevance_KT), grid.shape_HW[0] * grid.shape_HW[1]).float()
        maps_KN[:, (grid.rows_T * grid.shape_HW[1] + grid.columns_T).to(maps_KN.device)] = relevance_KT.float()
        return check_tokens(head.vit, tokens, "all", maps_KN)

    def scores_of(keep_ST: Tensor) -> Tensor:
        return torch.stack([_logits_from(head, z_TC, coords_um_T2, grid, keep_T) for keep_T in keep_ST])

    every = torch.ones(len(z_TC), dtype=torch.bool, device=z_TC.device)
    return check_maps(relevance_KT.float(), every, scores_of)


def _logits_from(
    head: SlideHead, z_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None, keep_T: Tensor
) -> Tensor:
    """Return the logits for the kept tiles alone."""
    on_host = keep_T.cpu()
    coords_um = None if coords_um_T2 is None else coords_um_T2[on_host]
    cells = None if grid is None else TileGrid(grid.rows_T[on_host], grid.columns_T[on_host], grid.shape_HW)
    logits: Tensor = head(z_TC[keep_T], coords_um, cells)
    return logits


def _describe_maps(
    run: SlideRun, relevance: RelevanceMap, checks: dict[str, MapCheck], means: TilingMeans | None
) -> dict[str, dict[str, Any]]:
    """Return class → a description of its map: the method, the sums, and the result of its test."""
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
        if relevance.path is not None:
            described[name] |= {
                "path_nodes": relevance.path.nodes,
                "path_gap": float(relevance.path.gap_K[index]),
            }
        if means is not None:
            scores_S = [float(run.model.scores(logits_K)[index]) for logits_K in means.logits_SK]
            described[name] |= {
                "tilings": means.tilings,
                "on_no_tile": float(means.outside_K[index]),
                "lowest_score": min(scores_S),
                "highest_score": max(scores_S),
            }
        described[name] |= checks[name].as_json() if name in checks else {"map_check": "not asked for"}
    return described


def _prediction(
    run: SlideRun,
    identity: ModelIdentity,
    tiles: RunTiles,
    encoded: EncodedTiles,
    logits_K: Tensor,
    scores: dict[str, float],
) -> SlidePrediction:
    grid, config = tiles.grid, run.model.config
    return SlidePrediction(
        slide_id=run.job.slide_id,
        prediction=max(scores, key=scores.__getitem__),
        scores=scores,
        logits=dict(zip(config.classes, logits_K.tolist(), strict=True)),
        model=identity,
        slide=_slide_file(run, tiles),
        tissue=_describe(run, tiles.tissue),
        settings={
            **_tile_settings(run, tiles),
            **recorded(run.job, run.settings, run.model.leaves_out),
            "workers": run.workers,
            "device": str(run.device),
        },
        counts=SlideCounts(
            cells=grid.cells,
            kept_tiles=grid.kept_tiles,
            kept_tokens=grid.kept_tokens,
            skipped_tokens=max(0, grid.skipped_tokens) if not run.alone else 0,
            unreadable_tiles=grid.kept_tiles - len(encoded.rows_T),
        ),
        notes=_notes(run, tiles, encoded),
        timings_s={name: round(seconds, 4) for name, seconds in run.stages.seconds.items()},
        versions=installed_versions(),
    )


def _slide_file(run: SlideRun, tiles: RunTiles) -> SlideFile:
    """Return the slide as it was read, or as its features describe it if there are only features."""
    path = run.job.path
    if run.alone:
        header = tiles.header
        return SlideFile(
            path=str(path),
            bytes=path.stat().st_size,
            vendor=None,
            width_px=header.width_px or 0,
            height_px=header.height_px or 0,
            spacing_um=header.spacing_lv0_um or 0.0,
            spacing_source="features",
            objective_power=header.magnification,
            reader="none: features alone",
        )
    return SlideFile.of(run.job, run.info)


def _tile_settings(run: SlideRun, tiles: RunTiles) -> dict[str, Any]:
    """Return the settings with which the tiles were cut."""
    grid, config = tiles.grid, run.model.config
    if isinstance(config, SlideModelConfig) and tiles.features is None:
        return {
            "tile_px": config.tile_px,
            "token_px": config.token_px,
            "spacing_um": config.spacing_um,
            "min_token_fraction": config.min_token_fraction,
        }
    encoder = run.model.card.encoder
    return {
        "tile_px": tiles.header.patch_size_px,
        "token_px": grid.token_px,
        "spacing_um": tiles.header.spacing_um,
        "token_mask": run.model.card.token_mask,
        "encoder": None if encoder is None else encoder.name,
    }


def _notes(run: SlideRun, tiles: RunTiles, encoded: EncodedTiles) -> tuple[str, ...]:
    """Return notes for the user on how the slide was read, other than those on its tissue."""
    on_tissue = () if tiles.tissue is None else tiles.tissue.notes
    notes = [] if run.alone else [note for note in run.reader.notes if note not in on_tissue]
    if encoded.reason is not None:
        notes.append(f"unreadable tiles were left out; the first because {encoded.reason}")
    if run.alone:
        notes.append("only features were given: the outputs are scores and relevance.h5, without pictures or outlines")
    if run.has_patches:
        notes.append(
            "maps show regions and their patches, from stored features; token maps need the pixels: also give the "
            "slides and the encoder of patches (--encoder, --weights)"
        )
    elif run.settings.tokens and not run.with_tokens:
        why = "the slide itself was not given" if run.alone else run.model.why_no_tokens
        no_overlap = ", and tiles do not overlap" if run.settings.overlap else ""
        notes.append(f"maps show tiles, not tokens{no_overlap}: {why}")
    if not tiles.on_lattice:
        notes.append("the tiles are not on one grid, which the slide model does not need")
    return tuple(notes)


def _describe(run: SlideRun, tissue: TissueMask | None) -> dict[str, Any]:
    if tissue is not None:
        return {"method": tissue.method, "fraction": float(tissue.tissue_fraction), "notes": list(tissue.notes)}
    if run.settings.features_dir is not None:
        return {"method": "none: the tiles are those of the features", "fraction": 1.0, "notes": []}
    return {"method": "none: all of the slide takes part", "fraction": 1.0, "notes": []}
