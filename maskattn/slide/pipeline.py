"""Pipeline: a slide in; a prediction, features, relevance and heat maps out.

reader → tissue → grid → stream of tiles → tile encoder on packed tokens → slide encoder → scores → relevance of tiles
→ (where asked) a second stream for the relevance of tokens → outputs. Memory is bounded by the batch size and the
thumbnail, apart from the O(tiles) embeddings and masks; token maps go to the file batch by batch.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import maskattn
from maskattn.explain.hierarchical import HierarchicalCDAM, RelevanceMap
from maskattn.nn.slide_model import SlideModel
from maskattn.shapes import Bool, Float, Int, UInt8
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.manifest import SlideJob
from maskattn.slide.output_folder import slide_folder
from maskattn.slide.overlay import MapCanvas, write_heatmap
from maskattn.slide.prediction import ModelIdentity, SlideCounts, SlideFile, SlidePrediction
from maskattn.slide.reader import SlideError, SlideInfo, SlideReader
from maskattn.slide.stream import TileBatch, stream_tiles
from maskattn.slide.tables import TileGeometry, TokenRows, write_features, write_relevance
from maskattn.slide.tissue import TissueMask, find_tissue, load_mask

__all__ = ["RunSettings", "SlideJob", "SlidePrediction", "identify_model", "predict_slide"]

THUMBNAIL_PX = 1536
_VERSIONED = ("torch", "numpy", "openslide-python", "openslide-bin", "opencv-python-headless", "h5py")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """How slides are run.

    Attributes:
        out_dir: each slide's outputs go to ``out_dir/<slide_id>/``.
        batch_size: tiles encoded at a time; bounds the memory.
        workers: processes that decode tiles; 0 = decode in this one.
        tokens: also make relevance maps at the resolution of tokens, in a second pass over the slide.
        masked: False attends to glass too, for comparison.
        overwrite: run finished slides again.
        spacing_um: µm per level-0 pixel of every slide, in place of what manifest and files say.
        mask_values: the labels of a user's mask that mean tissue; None = any but 0.
    """

    out_dir: Path
    batch_size: int = 32
    workers: int = 0
    tokens: bool = False
    masked: bool = True
    overwrite: bool = False
    spacing_um: float | None = None
    mask_values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Encoded:
    """Embeddings of the tiles that could be read: rows_T are their rows among the grid's kept tiles."""

    embeddings_TC: Float[Tensor, "T C"]
    rows_T: Int[np.ndarray, " T"]
    keep_HW: Bool[Tensor, "H W"]


class _Stages:
    """Seconds per stage; on a GPU each stage waits for its own work to end."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    stages = _Stages(model.device)
    with stages("open"):
        given = (job.spacing_um, "manifest") if settings.spacing_um is None else (settings.spacing_um, "override")
        reader = SlideReader(job.path, *given)
    with reader, slide_folder(settings.out_dir, job.slide_id) as folder:
        return _Run(job, model, identity, settings, reader, stages, on_tiles).write(folder)


def identify_model(model: SlideModel) -> ModelIdentity:
    """Which model it is, as outputs name it."""
    config = model.config
    return ModelIdentity(config.name, model.identity()[:16], config.classes, config.demonstration, config.note)


class _Run:
    """One slide's way through the pipeline."""

    def __init__(
        self,
        job: SlideJob,
        model: SlideModel,
        identity: ModelIdentity,
        settings: RunSettings,
        reader: SlideReader,
        stages: _Stages,
        on_tiles: Callable[[int, int], None] | None,
    ) -> None:
        self.job, self.model, self.settings, self.reader, self.stages = job, model, settings, reader, stages
        self.identity = identity
        self.info: SlideInfo = reader.info
        self.device = model.device
        self.on_tiles = on_tiles
        self.tiles_done = 0

    def write(self, folder: Path) -> SlidePrediction:
        """Run every stage and write every output to ``folder``."""
        with self.stages("tissue"):
            tissue = self._tissue()
        with self.stages("grid"):
            grid = self._grid(tissue)
        encoded = self._encode(grid)
        with self.stages("slide"), torch.inference_mode():
            logits_K = self.model(encoded.embeddings_TC, encoded.keep_HW.to(self.device)).float().cpu()
        if not bool(logits_K.isfinite().all()):
            raise SlideError(f"a model's scores must be finite, got {logits_K.tolist()}; check the model's weights")
        with self.stages("relevance"):
            relevance = HierarchicalCDAM(self.model).tiles(encoded.embeddings_TC, encoded.keep_HW.to(self.device))
        scores = dict(zip(self.model.config.classes, logits_K.softmax(dim=0).tolist(), strict=True))
        self._write_outputs(folder, grid, encoded, relevance, scores)
        prediction = self._prediction(tissue, grid, encoded, logits_K, scores)
        prediction.write(folder / "prediction.json")
        return prediction

    def _tissue(self) -> TissueMask | None:
        """The tissue, or None where the run attends to all of the slide."""
        if not (self.settings.masked and self.model.config.masked):
            return None
        if self.job.mask_path is not None:
            return load_mask(self.job.mask_path, self.info, self.settings.mask_values)
        return find_tissue(self.reader)

    def _grid(self, tissue: TissueMask | None) -> TokenGrid:
        config = self.model.config
        grid = make_grid(
            self.info,
            tissue,
            tile_px=config.tile_px,
            token_px=config.token_px,
            spacing_um=config.spacing_um,
            min_token_fraction=config.min_token_fraction,
            masked=tissue is not None,
        )
        if tissue is not None and grid.kept_tiles == 0:
            notes = f" ({'; '.join(tissue.notes)})" if tissue.notes else ""
            raise SlideError(
                f"a slide must show tissue, got none by {tissue.method} in {self.job.path}{notes}; look at it with "
                f"`maskattn tissue {self.job.path}` and name the tissue in a mask of your own (--mask)"
            )
        return grid

    def _encode(self, grid: TokenGrid) -> _Encoded:
        """Tile embeddings in the grid's order; tiles that cannot be read are left out of the slide's keep mask."""
        embeddings_TC: Tensor | None = None
        readable_T = np.zeros(grid.kept_tiles, dtype=bool)
        passes = 2 if self.settings.tokens else 1
        for batch in self._stream("read", grid, None):
            with self.stages("encode"):
                with torch.inference_mode():
                    encoded_BC = self.model.encode_tiles(*self._on_device(batch, grid)).float()
                if embeddings_TC is None:
                    # Made outside inference mode: the relevance pass takes gradients with respect to it.
                    embeddings_TC = torch.zeros(grid.kept_tiles, encoded_BC.shape[1], device=self.device)
                embeddings_TC[batch.rows_B.to(self.device)] = encoded_BC
            readable_T[batch.rows_B.numpy()] = batch.readable_B.numpy()
            self._count(len(batch.rows_B), passes * grid.kept_tiles)
        rows_T = np.flatnonzero(readable_T)
        if embeddings_TC is None or not len(rows_T):
            raise SlideError(
                f"a slide must have tiles that can be read, got {grid.kept_tiles} of {grid.kept_tiles} unreadable in "
                f"{self.job.path}; the file is damaged: copy it again, or scan the slide again"
            )
        keep_HW = np.zeros_like(grid.keep_HW)
        keep_HW[tuple(np.argwhere(grid.keep_HW)[rows_T].T)] = True
        return _Encoded(embeddings_TC[torch.from_numpy(rows_T).to(self.device)], rows_T, torch.from_numpy(keep_HW))

    def _write_outputs(
        self, folder: Path, grid: TokenGrid, encoded: _Encoded, relevance: RelevanceMap, scores: dict[str, float]
    ) -> None:
        slide_id, classes, coords_T2 = self.job.slide_id, self.model.config.classes, grid.coords_lv0[encoded.rows_T]
        geometry = _geometry(self.info, grid)
        relevance_KT, attention_T = (_numpy(maps) for maps in (relevance.relevance_KT, relevance.attention_T))
        with self.stages("write"):
            write_features(folder / "features.h5", _numpy(encoded.embeddings_TC), coords_T2, geometry, slide_id)
            thumbnail = self._thumbnail()
            slide_px = (self.info.height_px, self.info.width_px)
            canvas = MapCanvas(len(classes) + 1, thumbnail.shape[:2], slide_px, grid.tile_lv0)
        tables = (classes, relevance_KT, attention_T, coords_T2, geometry, slide_id)
        if self.settings.tokens:
            with self.stages("tokens"):
                batches = self._token_maps(grid, encoded, relevance, canvas)
                write_relevance(folder / "relevance.h5", *tables, (grid.token_keep_THW.shape[1:], batches))
        else:
            with self.stages("write"):
                write_relevance(folder / "relevance.h5", *tables)
                values_MT = np.concatenate([relevance_KT, attention_T[None]])
                canvas.paint(coords_T2, values_MT[:, :, None, None], grid.token_keep_THW[encoded.rows_T])
        with self.stages("write"):
            self._write_heatmaps(folder, thumbnail, canvas, scores)

    def _token_maps(
        self, grid: TokenGrid, encoded: _Encoded, relevance: RelevanceMap, canvas: MapCanvas
    ) -> Iterator[TokenRows]:
        """Token-level maps batch by batch, painted on the canvas on their way to the file."""
        explain = HierarchicalCDAM(self.model)
        place_of_row = np.full(grid.kept_tiles, -1)
        place_of_row[encoded.rows_T] = np.arange(len(encoded.rows_T))
        attention_T = _numpy(relevance.attention_T)
        for batch in self._stream(None, grid, encoded.rows_T):
            places_B = place_of_row[batch.rows_B.numpy()]
            tiles, keep = self._on_device(batch, grid)
            maps = explain.tokens(tiles, keep, relevance.gradient_KTC[:, torch.from_numpy(places_B).to(self.device)])
            relevance_KBhw, attention_Bhw = _numpy(maps.relevance_KBHW), _numpy(maps.attention_BHW)
            # A tile that could be read once and not again has no map: its tokens stay unknown rather than white.
            keep_Bhw = keep.cpu().numpy() & batch.readable_B.numpy()[:, None, None]
            relevance_KBhw, attention_Bhw = relevance_KBhw * keep_Bhw, attention_Bhw * keep_Bhw
            share_Bhw = attention_Bhw * attention_T[places_B, None, None]
            canvas.paint(
                grid.coords_lv0[batch.rows_B.numpy()], np.concatenate([relevance_KBhw, share_Bhw[None]]), keep_Bhw
            )
            yield TokenRows(places_B, relevance_KBhw, attention_Bhw, keep_Bhw)
            self._count(len(places_B), grid.kept_tiles + len(encoded.rows_T))

    def _write_heatmaps(
        self, folder: Path, thumbnail: UInt8[np.ndarray, "Y X 3"], canvas: MapCanvas, scores: dict[str, float]
    ) -> None:
        config = self.model.config
        by = f"model {config.name}" + (", a demonstration model" if config.demonstration else "")
        for name, values in zip(config.classes, canvas.values_MYX, strict=False):
            title = f"{self.job.slide_id}: relevance for class {name!r}, score {scores[name]:.3f}; {by}"
            path = folder / f"heatmap_{name.translate(_UNSAFE_IN_NAMES)}.png"
            write_heatmap(path, thumbnail, values, title, "relevance (+ for, − against)", "diverging")
        title = f"{self.job.slide_id}: attention of the class token; {by}"
        write_heatmap(folder / "attention.png", thumbnail, canvas.values_MYX[-1], title, "attention", "sequential")

    def _prediction(
        self, tissue: TissueMask | None, grid: TokenGrid, encoded: _Encoded, logits_K: Tensor, scores: dict[str, float]
    ) -> SlidePrediction:
        info, config, settings = self.info, self.model.config, self.settings
        return SlidePrediction(
            slide_id=self.job.slide_id,
            prediction=max(scores, key=scores.__getitem__),
            scores=scores,
            logits=dict(zip(config.classes, logits_K.tolist(), strict=True)),
            model=self.identity,
            slide=SlideFile(
                path=str(self.job.path),
                bytes=self.job.path.stat().st_size,
                vendor=info.vendor,
                width_px=info.width_px,
                height_px=info.height_px,
                spacing_um=info.spacing_um,
                spacing_source=info.spacing_source,
                objective_power=info.objective_power,
            ),
            tissue=_describe(tissue),
            settings={
                "tile_px": config.tile_px,
                "token_px": config.token_px,
                "spacing_um": config.spacing_um,
                "min_token_fraction": config.min_token_fraction,
                "masked": tissue is not None,
                "tokens": settings.tokens,
                "mask": None if self.job.mask_path is None else self.job.mask_path.name,
                "mask_values": settings.mask_values and list(settings.mask_values),
                "batch_size": settings.batch_size,
                "workers": settings.workers,
                "device": str(self.device),
            },
            counts=SlideCounts(
                cells=grid.cells,
                kept_tiles=grid.kept_tiles,
                kept_tokens=grid.kept_tokens,
                skipped_tokens=grid.skipped_tokens,
                unreadable_tiles=grid.kept_tiles - len(encoded.rows_T),
            ),
            timings_s={name: round(seconds, 4) for name, seconds in self.stages.seconds.items()},
            versions=_versions(),
        )

    def _stream(self, stage: str | None, grid: TokenGrid, rows_T: np.ndarray | None) -> Iterator[TileBatch]:
        """Batches of tiles; the time spent waiting for each counts for ``stage``."""
        settings = self.settings
        batches = stream_tiles(
            self.reader,
            grid,
            batch_size=settings.batch_size,
            workers=settings.workers,
            rows=rows_T,
            pin_memory=self.device.type == "cuda",
        )
        if stage is None:
            yield from batches
            return
        while True:
            with self.stages(stage):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _on_device(self, batch: TileBatch, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        keep_BHW = torch.from_numpy(np.ascontiguousarray(grid.token_keep_THW[batch.rows_B.numpy()]))
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in (batch.tiles_BCHW, keep_BHW))  # type: ignore[return-value] # two in, two out

    def _thumbnail(self) -> UInt8[np.ndarray, "Y X 3"]:
        """The slide's thumbnail, or white where a damaged slide gives none: its good tiles still have a map."""
        try:
            return self.reader.thumbnail(THUMBNAIL_PX)
        except SlideError as error:
            _logger.warning("no thumbnail of %s: %s", self.job.path, error)
            shrink = max(1.0, max(self.info.width_px, self.info.height_px) / THUMBNAIL_PX)
            shape = (round(self.info.height_px / shrink), round(self.info.width_px / shrink), 3)
            return np.full(shape, 255, dtype=np.uint8)

    def _count(self, tiles: int, total: int) -> None:
        self.tiles_done += tiles
        if self.on_tiles is not None:
            self.on_tiles(self.tiles_done, total)


_UNSAFE_IN_NAMES = str.maketrans(dict.fromkeys("/\\\0", "_"))


def _describe(tissue: TissueMask | None) -> dict[str, Any]:
    if tissue is None:
        return {"method": "none: all of the slide takes part", "fraction": 1.0, "notes": []}
    return {"method": tissue.method, "fraction": float(tissue.tissue_fraction), "notes": list(tissue.notes)}


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


def _versions() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "maskattn": maskattn.__version__}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
