"""Outputs: features, relevance and heat maps of one slide, from what its run found.

Token maps are made here, in a second pass over the tiles, and go to the file and onto the canvas batch by batch: they
are the one thing that grows with the tokens of a slide, and are never held together.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.explain.hierarchical import HierarchicalCDAM, RelevanceMap
from maskattn.lettering import drawable
from maskattn.shapes import UInt8
from maskattn.slide.grid import TokenGrid
from maskattn.slide.overlay import MapCanvas, write_heatmap
from maskattn.slide.reader import SlideInfo
from maskattn.slide.slide_run import EncodedTiles, SlideRun
from maskattn.slide.tables import TileGeometry, TokenRows, write_features, write_relevance

__all__ = ["THUMBNAIL_PX", "file_names_of", "write_outputs"]

THUMBNAIL_PX = 1536
_MOST_NAME_BYTES = 150

_logger = logging.getLogger(__name__)


def write_outputs(
    folder: Path,
    run: SlideRun,
    grid: TokenGrid,
    encoded: EncodedTiles,
    relevance: RelevanceMap,
    scores: dict[str, float],
) -> None:
    """Write ``features.h5``, ``relevance.h5``, ``heatmap_<class>.png`` and ``attention.png`` to a slide's folder.

    Args:
        folder: where to.
        run: the slide's run; with ``settings.tokens`` its tiles are read once more.
        grid: of the slide.
        encoded: the embeddings.
        relevance: of the tiles.
        scores: class → score, for the titles.

    Raises:
        OSError: a file cannot be written.
    """
    slide_id, classes, coords_T2 = run.job.slide_id, run.model.config.classes, grid.coords_lv0[encoded.rows_T]
    geometry = _geometry(run.info, grid)
    relevance_KT, attention_T = _numpy(relevance.relevance_KT), _numpy(relevance.attention_T)
    with run.stages("write"):
        write_features(folder / "features.h5", _numpy(encoded.embeddings_TC), coords_T2, geometry, slide_id)
        thumbnail = _thumbnail(run)
        slide_px = (run.info.height_px, run.info.width_px)
        canvas = MapCanvas(len(classes) + 1, thumbnail.shape[:2], slide_px, grid.tile_lv0)
        token_maps = None
        if run.settings.tokens:
            token_maps = (grid.token_keep_THW.shape[1:], _token_maps(run, grid, encoded, relevance, canvas))
        else:
            values_MT = np.concatenate([relevance_KT, attention_T[None]])
            canvas.paint(coords_T2, values_MT[:, :, None, None], grid.token_keep_THW[encoded.rows_T])
    with run.stages("tokens" if run.settings.tokens else "write"):
        tables = (classes, relevance_KT, attention_T, coords_T2, geometry, slide_id)
        write_relevance(folder / "relevance.h5", *tables, token_maps)
    with run.stages("write"):
        _write_heatmaps(folder, run, thumbnail, canvas, scores)


def _token_maps(
    run: SlideRun, grid: TokenGrid, encoded: EncodedTiles, relevance: RelevanceMap, canvas: MapCanvas
) -> Iterator[TokenRows]:
    """Token-level maps batch by batch, painted on the canvas on their way to the file."""
    explain = HierarchicalCDAM(run.model)
    assert relevance.gradient_KTC is not None, "the pipeline takes the gradient wherever tokens are asked for"
    attention_T = _numpy(relevance.attention_T)
    for batch in run.read(grid, encoded.rows_T):
        places_B = np.searchsorted(encoded.rows_T, batch.rows_B)
        gradient_KBC = relevance.gradient_KTC[:, torch.from_numpy(places_B).to(run.device)]
        maps = explain.tokens(batch.tiles_BCHW, batch.keep_BHW, gradient_KBC)
        # A tile that could be read once and not again has no map: its tokens stay unknown.
        keep_Bhw = batch.keep_BHW.cpu().numpy() & batch.readable_B[:, None, None]
        relevance_KBhw, attention_Bhw = _numpy(maps.relevance_KBHW) * keep_Bhw, _numpy(maps.attention_BHW) * keep_Bhw
        share_Bhw = attention_Bhw * attention_T[places_B, None, None]
        canvas.paint(grid.coords_lv0[batch.rows_B], np.concatenate([relevance_KBhw, share_Bhw[None]]), keep_Bhw)
        yield TokenRows(places_B, relevance_KBhw, attention_Bhw, keep_Bhw)


def _write_heatmaps(
    folder: Path, run: SlideRun, thumbnail: UInt8[np.ndarray, "Y X 3"], canvas: MapCanvas, scores: dict[str, float]
) -> None:
    config = run.model.config
    # Where no font has a name's signs, the name of the file and its folder has to do.
    of = f"{slide_id}: " if (slide_id := drawable(run.job.slide_id)) else ""
    parts = [f"model {drawable(config.name)}"] if drawable(config.name) else []
    parts += ["a demonstration model"] if config.demonstration else []
    by = f"; {', '.join(parts)}" if parts else ""
    file_names = file_names_of(config.classes)
    for place, (name, values) in enumerate(zip(config.classes, canvas.values_MYX, strict=False)):
        named = repr(drawable(name)) if drawable(name) else f"{place + 1} of {len(config.classes)}"
        title = f"{of}relevance for class {named}, score {scores[name]:.3f}{by}"
        path = folder / f"heatmap_{file_names[place]}.png"
        write_heatmap(path, thumbnail, values, title, "relevance (+ for, − against)", "diverging")
    title = f"{of}attention of the class token{by}"
    write_heatmap(folder / "attention.png", thumbnail, canvas.values_MYX[-1], title, "attention", "sequential")


def file_names_of(classes: Sequence[str]) -> list[str]:
    """What stands for each class in the names of its files: distinct on every file system, and short enough."""
    names = []
    for name in classes:
        plain = "".join("_" if sign in "/\\" or not sign.isprintable() else sign for sign in name)
        names.append(plain.encode()[:_MOST_NAME_BYTES].decode(errors="ignore"))
    if len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(names):
        return names
    return [f"{name}_{place}" for place, name in enumerate(names)]


def _thumbnail(run: SlideRun) -> UInt8[np.ndarray, "Y X 3"]:
    """The slide's thumbnail, or white where a damaged slide gives none: its good tiles still have a map."""
    try:
        return run.reader.thumbnail(THUMBNAIL_PX)
    except SlideError as error:
        _logger.warning("no thumbnail of %s: %s", run.job.path, error)
        shrink = max(1.0, max(run.info.width_px, run.info.height_px) / THUMBNAIL_PX)
        height, width = (max(1, round(side / shrink)) for side in (run.info.height_px, run.info.width_px))
        return np.full((height, width, 3), 255, dtype=np.uint8)


def _geometry(info: SlideInfo, grid: TokenGrid) -> TileGeometry:
    level0_magnification = info.objective_power or 10.0 / info.spacing_um
    return TileGeometry(
        patch_size=grid.tile_px,
        patch_size_level0=grid.tile_lv0,
        level0_magnification=level0_magnification,
        target_magnification=level0_magnification * grid.tile_px / grid.tile_lv0,
        level0_width=info.width_px,
        level0_height=info.height_px,
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
