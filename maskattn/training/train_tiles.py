"""Fine-tune a tile encoder on labelled patches, or on tiles of labelled slides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from maskattn.evaluation.calibration import fit_temperature, with_temperature
from maskattn.evaluation.splits import Split, check_classes
from maskattn.files import replacing
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.slide_models.card import EncoderFacts, ModelCard
from maskattn.nn.slide_models.folder import save_model
from maskattn.nn.slide_models.head import SlideHead
from maskattn.nn.slide_models.ordinal import OrdinalHead
from maskattn.nn.slide_models.pooling import PooledHead
from maskattn.training.batches import CaseBatches, InOrder
from maskattn.training.cohort import Case, Cohort
from maskattn.training.encoder_to_tune import encoder_to_tune
from maskattn.training.loop import FitResult, Progress, fit, loader_of
from maskattn.training.patches import PatchDataset
from maskattn.training.processes import check_counts
from maskattn.training.run_folder import check_run, full_disk_in_words, note_data, place_of_process
from maskattn.training.settings import TrainSettings
from maskattn.training.slide_module import predictions_of
from maskattn.training.slide_tile_data import SlideTileDataset, bags_of
from maskattn.training.slide_tiles import LaidSlides
from maskattn.training.tasks import task_of
from maskattn.training.tile_module import TileTraining, prepared
from maskattn.training.train import PREDICTIONS, TrainedRun

__all__ = ["ENCODER", "train_tiles"]

ENCODER = "encoder.safetensors"
_BATCH_SIZE = 32
_TILES_PER_SLIDE = 32


def train_tiles(
    settings: TrainSettings,
    cohort: Cohort,
    split: Split,
    out: Path,
    *,
    laid: LaidSlides | None = None,
    progress: Progress | None = None,
) -> TrainedRun:
    """Fine-tune an encoder; an interrupted run is resumed.

    The folder then has the encoder's weights, ``encoder.safetensors`` (for ``--encoder NAME --weights``), and a slide
    model that applies the linear layer to the mean of a slide's tiles.

    Args:
        settings: the settings of the training.
        cohort: the patches, as :func:`maskattn.training.patches.find_patches` finds them, or the slides.
        split: the patients for training and for validation.
        out: folder of the run.
        laid: the slides' tiles, as :func:`maskattn.training.weak_labels.with_tiles` lays them; None for patches.
        progress: receives the progress of the training.

    Raises:
        SlideError: a patch or its mask cannot be read.
        ValueError: the encoder is not a packed transformer, a part lacks a class, or ``out`` has a run of another
            configuration.
        OutputError: the run cannot be written; earlier files are kept.
        GroupError: one of the processes that train together has ended.
    """
    check_run(out, settings)
    training, validation = cohort.of(split.train), cohort.of(split.validation)
    check_classes([replace(split, test=())], {case.patient_id: case.truth[0] for case in training + validation})
    rank, _ = place_of_process(settings)
    encoder = encoder_to_tune(settings) if laid is None else laid.encoder
    data = _Data(settings, cohort, training, validation, encoder, laid)
    check_counts(settings, len(data.judged()))
    with full_disk_in_words(out):
        if rank == 0:
            note_data(out, settings, _digest(data))
        module, result = _fitted(data, out, progress)
        if rank:
            raise SystemExit(0)  # only the first process writes the results
        return _finished(data, out, module, result)


@dataclass(frozen=True)
class _Data:
    """The data of a fine-tuning, as patches or as tiles of slides."""

    settings: TrainSettings
    cohort: Cohort
    training: Sequence[Case]
    validation: Sequence[Case]
    encoder: TileEncoder
    laid: LaidSlides | None

    def learnt(self) -> PatchDataset | SlideTileDataset:
        """Return the training dataset."""
        settings, laid = self.settings, self.laid
        if laid is None:
            return PatchDataset(self.training, *self._shape, settings.seed, settings.drop_tokens)
        most = settings.tiles_per_slide or _TILES_PER_SLIDE
        return SlideTileDataset(self.training, laid.tiles, settings.fusion, most, settings.seed, settings.drop_tokens)

    def judged(self) -> PatchDataset | SlideTileDataset:
        """Return the validation dataset."""
        if self.laid is None:
            return PatchDataset(self.validation, *self._shape)
        settings = self.settings
        return SlideTileDataset(self.validation, self.laid.tiles, settings.fusion, settings.validation_tiles)

    @property
    def count(self) -> str:
        """The number of patches or slides, as a phrase for the model's card."""
        count = sum(len(case.slides) for case in self.cohort.cases)
        return f"{count} {'labelled patches' if self.laid is None else 'slides, each tile with the label of its slide'}"

    @property
    def case_of_bag(self) -> list[int] | None:
        """The index of each bag's validation case; None if each case is one patch."""
        if self.laid is None:
            return None
        return [case for case, _ in bags_of(self.validation, self.settings.fusion)]

    @property
    def _shape(self) -> tuple[int, int, bool]:
        return self.encoder.tile_px, self.encoder.token_px, self.settings.token_mask == "tissue"


def _fitted(data: _Data, out: Path, progress: Progress | None) -> tuple[TileTraining, FitResult]:
    settings, cohort = data.settings, data.cohort
    rank, processes = place_of_process(settings)
    task = task_of(cohort.task, len(cohort.classes), data.training, settings.class_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder = prepared(data.encoder, settings)
        module = TileTraining(encoder, task, settings, cohort, data.validation, data.case_of_bag)
    batch_size = settings.batch_size or _BATCH_SIZE
    learnt, judged = data.learnt(), data.judged()
    batches = CaseBatches(len(learnt), batch_size * processes, settings.seed, None, rank, processes)
    result = fit(
        module,
        loader_of(learnt, settings, batch_sampler=batches),
        loader_of(judged, settings, sampler=InOrder(len(judged), rank, processes), batch_size=batch_size),
        folder=out,
        metric=module.metric,
        progress=progress,
    )
    return module, result


def _finished(data: _Data, out: Path, module: TileTraining, result: FitResult) -> TrainedRun:
    """Write the encoder, the linear layer as a slide model, and their predictions of the validation cases."""
    from safetensors.torch import save

    settings, cohort = data.settings, data.cohort
    judged, device = data.judged(), settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    order = InOrder(len(judged))
    batches = loader_of(judged, settings, sampler=order, batch_size=settings.batch_size or _BATCH_SIZE)
    outputs_PK = module.outputs_of(batches, torch.device(device))
    module.cpu()
    encoder = module.encoder
    assert encoder.vit is not None, "a packed transformer was trained"
    encoder.__dict__.pop("sha256", None)  # the cached digest is that of the initial weights
    predictions = predictions_of(outputs_PK, data.validation, cohort, module.task)
    temperature = fit_temperature(predictions)
    predictions = with_temperature(predictions, temperature)
    best = result.rows[result.best_epoch]
    card = ModelCard(
        name=out.resolve().name,
        kind="pooled",
        classes=cohort.classes,
        encoder=EncoderFacts(encoder.name, encoder.embed_dim, encoder.sha256),
        tile_px=encoder.tile_px,
        patch_px=encoder.patch_px if data.laid is None else data.laid.patch_px,
        spacing_um=encoder.spacing_um if data.laid is None else data.laid.spacing_um,
        token_mask=settings.token_mask or "none",
        trained_on=f"{data.count}, with the encoder; it reads the mean of a slide's tiles",
        metrics={name: value for name, value in best.items() if name.startswith(("train_", "validation_"))},
        facts={"epoch": str(result.best_epoch), "encoder's weights": ENCODER},
        task=cohort.task,
        target=cohort.target,
        temperature=temperature,
    )
    with replacing(out / ENCODER) as temporary:
        temporary.write_bytes(save({name: x.contiguous() for name, x in encoder.vit.state_dict().items()}))
    predictions.write_csv(out / PREDICTIONS)
    save_model(out, _head_of(module, cohort), card)
    return TrainedRun(out, result.best_epoch, result.rows, predictions, temperature, result.went_on)


def _head_of(module: TileTraining, cohort: Cohort) -> SlideHead:
    """Return the linear layer as a slide model on the mean of a slide's tiles."""
    pooled = PooledHead(module.encoder.embed_dim, module.head.out_features)
    pooled.mlp.load_state_dict({f"0.{name}": x for name, x in module.head.state_dict().items()})
    return OrdinalHead(pooled) if cohort.task == "ordinal" else pooled


def _digest(data: _Data) -> str:
    """Return the SHA-256 of a run's data: the cases of both parts, their truth and tiles, and the initial weights."""
    cases = [[(case.case_id, case.truth) for case in part] for part in (data.training, data.validation)]
    contents = [cases, data.encoder.sha256]
    if data.laid is not None:
        both = [*data.training, *data.validation]
        contents.append([(slide, data.laid.tiles[slide].digest()) for case in both for slide in case.slides])
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
