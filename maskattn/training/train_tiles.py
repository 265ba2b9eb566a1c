"""Fine-tune a tile encoder on labelled patches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from maskattn.evaluation.calibration import fit_temperature, with_temperature
from maskattn.evaluation.splits import Split, check_classes
from maskattn.files import replacing
from maskattn.nn.encoders.loading import load_encoder
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.slide_models.card import EncoderFacts, ModelCard
from maskattn.nn.slide_models.folder import save_model
from maskattn.nn.slide_models.head import SlideHead
from maskattn.nn.slide_models.ordinal import OrdinalHead
from maskattn.nn.slide_models.pooling import PooledHead
from maskattn.training.bags import Draw
from maskattn.training.batches import CaseBatches, InOrder
from maskattn.training.cohort import Case, Cohort
from maskattn.training.loop import FitResult, Progress, fit, loader_of
from maskattn.training.patches import PatchDataset
from maskattn.training.run_folder import check_run, full_disk_in_words, note_data, place_of_process
from maskattn.training.settings import TrainSettings
from maskattn.training.slide_module import predictions_of
from maskattn.training.tasks import task_of
from maskattn.training.tile_module import TileTraining, prepared
from maskattn.training.train import PREDICTIONS, TrainedRun

__all__ = ["ENCODER", "train_tiles"]

ENCODER = "encoder.safetensors"
_BATCH_SIZE = 32


def train_tiles(
    settings: TrainSettings, cohort: Cohort, split: Split, out: Path, *, progress: Progress | None = None
) -> TrainedRun:
    """Fine-tune an encoder: a run that was killed goes on.

    The folder has the encoder's weights, ``encoder.safetensors``, which its name loads (``--encoder NAME --weights``),
    and a slide model that applies the linear layer to the mean of a slide's tiles.

    Args:
        settings: of the training.
        cohort: the patches, as :func:`maskattn.training.patches.find_patches` finds them.
        split: which patients' patches teach and which judge.
        out: folder of the run.
        progress: gets the progress of the training.

    Raises:
        SlideError: a patch or its mask cannot be read.
        ValueError: the encoder is no packed transformer, a part lacks a class, or ``out`` has a run of another
            configuration.
        OutputError: the run cannot be written; what was there is kept.
    """
    if settings.encoder is None:
        raise ValueError(
            "--stage tile must have --encoder, which is fine-tuned, got none; `maskattn encoders` lists them"
        )
    check_run(out, settings)
    training, validation = cohort.of(split.train), cohort.of(split.validation)
    check_classes([replace(split, test=())], {case.patient_id: case.truth[0] for case in training + validation})
    rank, _ = place_of_process(settings)
    encoder = load_encoder(settings.encoder, impl=settings.impl, weights=settings.weights)
    with full_disk_in_words(out):
        if rank == 0:
            note_data(out, settings, _digest(training, validation, encoder.sha256))
        module, result = _fitted(settings, cohort, training, validation, encoder, out, progress)
        if rank:
            raise SystemExit(0)  # the first process alone writes what was learnt
        return _finished(settings, cohort, validation, out, module, result)


def _fitted(
    settings: TrainSettings,
    cohort: Cohort,
    training: Sequence[Case],
    validation: Sequence[Case],
    encoder: TileEncoder,
    out: Path,
    progress: Progress | None,
) -> tuple[TileTraining, FitResult]:
    rank, processes = place_of_process(settings)
    task = task_of(cohort.task, len(cohort.classes), training, settings.class_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        module = TileTraining(prepared(encoder, settings), task, settings, cohort, validation)
    batch_size = settings.batch_size or _BATCH_SIZE
    batches = CaseBatches(len(training), batch_size * processes, settings.seed, None, rank, processes)
    shape = (encoder.tile_px, encoder.token_px, settings.token_mask == "tissue")
    learnt = PatchDataset(training, *shape, settings.seed, settings.drop_tokens)
    result = fit(
        module,
        loader_of(learnt, settings, batch_sampler=batches),
        loader_of(
            PatchDataset(validation, *shape),
            settings,
            sampler=InOrder(len(validation), rank, processes),
            batch_size=batch_size,
        ),
        folder=out,
        metric=module.metric,
        progress=progress,
    )
    return module, result


@torch.no_grad()
def _finished(
    settings: TrainSettings,
    cohort: Cohort,
    validation: Sequence[Case],
    out: Path,
    module: TileTraining,
    result: FitResult,
) -> TrainedRun:
    """Write the encoder, the linear layer as a slide model, and what they say of the validation patches."""
    from safetensors.torch import save

    module.cpu().eval()
    encoder = module.encoder
    assert encoder.vit is not None, "a packed transformer was trained"
    encoder.__dict__.pop("sha256", None)  # it was that of the weights to begin with
    dataset = PatchDataset(validation, encoder.tile_px, encoder.token_px, settings.token_mask == "tissue")
    outputs_PK = torch.cat([module.outputs([dataset[Draw(index, 0)]]).float() for index in range(len(dataset))])
    said = predictions_of(outputs_PK, validation, cohort, module.task)
    temperature = fit_temperature(said)
    said = with_temperature(said, temperature)
    best = result.rows[result.best_epoch]
    card = ModelCard(
        name=out.resolve().name,
        kind="pooled",
        classes=cohort.classes,
        encoder=EncoderFacts(encoder.name, encoder.embed_dim, encoder.sha256),
        tile_px=encoder.tile_px,
        patch_px=encoder.patch_px,
        spacing_um=encoder.spacing_um,
        token_mask=settings.token_mask or "none",
        trained_on=f"{len(cohort.cases)} labelled patches, with the encoder; it reads the mean of a slide's tiles",
        metrics={name: value for name, value in best.items() if name.startswith(("train_", "validation_"))},
        facts={"epoch": str(result.best_epoch), "encoder's weights": ENCODER},
        task=cohort.task,
        target=cohort.target,
        temperature=temperature,
    )
    with replacing(out / ENCODER) as temporary:
        temporary.write_bytes(save({name: x.contiguous() for name, x in encoder.vit.state_dict().items()}))
    said.write_csv(out / PREDICTIONS)
    save_model(out, _head_of(module, cohort), card)
    return TrainedRun(out, result.best_epoch, result.rows, said, temperature, result.went_on)


def _head_of(module: TileTraining, cohort: Cohort) -> SlideHead:
    """The linear layer as a model of the mean of a slide's tiles."""
    pooled = PooledHead(module.encoder.embed_dim, module.head.out_features)
    pooled.mlp.load_state_dict({f"0.{name}": x for name, x in module.head.state_dict().items()})
    return OrdinalHead(pooled) if cohort.task == "ordinal" else pooled


def _digest(training: Sequence[Case], validation: Sequence[Case], encoder: str) -> str:
    """SHA-256 over which patches are in which part, what is true of them, and the weights to begin with."""
    told = [[(case.case_id, case.truth) for case in part] for part in (training, validation)]
    return hashlib.sha256(json.dumps([told, encoder]).encode()).hexdigest()
