"""The training loop: Lightning's, with a state after each epoch from which a training is resumed bit for bit.

Random numbers in a step depend only on the seed, the epoch and the step, and the order of the cases on the seed and the
epoch. The state at the end of an epoch therefore consists of the weights, the optimiser, the schedule and early
stopping. A training that was killed at any time resumes from the last such state and ends with the weights of an
uninterrupted one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.utils.data import DataLoader

from maskattn.training.batches import CaseBatches
from maskattn.training.checkpoints import AtomicCheckpoints, read_state, write_state
from maskattn.training.epoch_log import TensorBoard, write_log
from maskattn.training.fit_settings import FitSettings
from maskattn.training.lightning import pl, quiet
from maskattn.training.module import TrainedModule
from maskattn.training.processes import together
from maskattn.training.run_folder import place_of_process

__all__ = ["FitResult", "Progress", "fit", "loader_of"]

_LAST, _BEST, _LOG = "last.ckpt", "best.ckpt", "log.csv"


class Progress(Protocol):
    """The interface of a training's progress report."""

    def looked_through(self, slide_id: str, done: int, slides: int) -> None:
        """Report that a feature file or a slide was scanned."""

    def batch_done(self, epoch: int, done: int, batches: int) -> None:
        """Report that a batch was trained."""

    def epoch_done(self, row: dict[str, float], best: bool) -> None:
        """Report the end of an epoch, with its row of the log, and whether it is the best so far."""


@dataclass
class FitResult:
    """The outcome of a training.

    Attributes:
        rows: the rows of the log, one per epoch.
        best_epoch: index of the best epoch on the validation cases; the last one without validation.
        went_on: whether the training was resumed from an earlier run.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    went_on: bool = False


def fit(
    module: TrainedModule,
    training: DataLoader[Any],
    validation: DataLoader[Any] | None,
    *,
    folder: Path | None = None,
    metric: str | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Train a module by its settings; at the end it has the weights of its best epoch.

    Args:
        module: the module.
        training: the training batches.
        validation: the validation batches; None: there are none, and the last epoch counts as the best.
        folder: the folder of states and log; None keeps neither.
        metric: the validation metric that is highest in the best epoch, with ``monitor="metric"``.
        progress: receives the progress of the training.

    Raises:
        OutputError: a state cannot be written; that of the previous epoch is kept.
        TrainingDivergedError: the loss is not finite.
        ValueError: there is no such device or precision.
        GroupError: one of the processes that train together has ended.
    """
    record = _Record(module.settings, folder, metric if module.settings.monitor == "metric" else None, progress)
    earlier = None if folder is None else read_state(folder / "state" / _LAST)
    if earlier is not None:
        record.take(earlier)
        if place_of_process(module.settings)[0] == 0:
            record.log_again()
    if isinstance(training.batch_sampler, CaseBatches):
        module.weight_of_batch = training.batch_sampler.weight
    if earlier is None or not record.finished:
        _run(module, training, validation, record, None if earlier is None else folder)
    if folder is not None and validation is not None:
        best = read_state(folder / "state" / _BEST)
        assert best is not None, "a training that has ended has a best epoch"
        module.load_state_dict(best["state_dict"])
    elif record.best_weights is not None:
        module.load_state_dict(record.best_weights)
    elif earlier is not None and record.finished:
        module.load_state_dict(earlier["state_dict"])
    return FitResult(record.rows, record.best_epoch, earlier is not None)


def _run(
    module: TrainedModule,
    training: DataLoader[Any],
    validation: DataLoader[Any] | None,
    record: _Record,
    going_on: Path | None,
) -> None:
    settings = module.settings
    callbacks: list[Any] = [record]
    if validation is not None and settings.patience:
        stopping = pl.callbacks.EarlyStopping(
            record.monitored, patience=settings.patience, mode=record.mode, check_on_train_epoch_end=False
        )
        callbacks.insert(0, stopping)  # first, so that its decision is in the state
    where = _accelerator(settings, module.some_unused)
    with quiet(), torch.random.fork_rng(devices=[]), together(settings) as plugins:
        trainer = pl.Trainer(
            **where,
            max_epochs=settings.epochs,
            precision=_precision(settings, where["accelerator"]),
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip or None,
            callbacks=callbacks,
            plugins=[AtomicCheckpoints(), *plugins],
            limit_val_batches=0 if validation is None else None,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(record.folder or Path.cwd()),
        )
        state = None if going_on is None else str(going_on / "state" / _LAST)
        try:
            trainer.fit(module, training, validation, ckpt_path=state)
        except SystemExit:
            # Lightning ends the process on Ctrl-C; here the caller decides.
            if record.interrupt is not None:
                raise record.interrupt from None
            raise


class _Record(pl.Callback):
    """Keeps the log, the best weights and the state of each epoch."""

    def __init__(
        self, settings: FitSettings, folder: Path | None, metric: str | None, progress: Progress | None
    ) -> None:
        self.settings, self.folder, self.progress = settings, folder, progress
        self.monitored = f"validation_{metric or 'loss'}"
        self.mode: Literal["min", "max"] = "max" if metric else "min"
        self.rows: list[dict[str, float]] = []
        self.best_epoch, self.finished = 0, False
        self.best_weights: dict[str, Any] | None = None
        self.interrupt: KeyboardInterrupt | None = None
        self._board: TensorBoard | None = None
        self._since, self._rate = time.perf_counter(), 0.0

    def take(self, state: dict[str, Any]) -> None:
        """Resume from the state of an earlier run."""
        own = state["maskattn"]
        self.rows, self.best_epoch, self.finished = list(own["rows"]), own["best_epoch"], own["finished"]

    def log_again(self) -> None:
        """Write the log again, because the earlier run may have been killed between a state and its row."""
        assert self.folder is not None, "the state of the earlier run was read from it"
        write_log(self.folder / _LOG, self.rows)
        board = TensorBoard(self.folder / "tensorboard", len(self.rows) - 1)
        board.add(self.rows[-1])
        board.close()

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the log to a state."""
        checkpoint["maskattn"] = {"rows": self.rows, "best_epoch": self.best_epoch, "finished": self.finished}

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Remember what interrupted the training."""
        if isinstance(exception, KeyboardInterrupt):
            self.interrupt = exception

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Open TensorBoard's file."""
        if self.folder is not None and trainer.is_global_zero:
            self._board = TensorBoard(self.folder / "tensorboard", len(self.rows))

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Record the learning rate of this step."""
        self._rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report the progress of the epoch."""
        if self.progress is not None and trainer.is_global_zero:
            self.progress.batch_done(trainer.current_epoch, batch_idx + 1, int(trainer.num_training_batches))

    def on_train_epoch_end(self, trainer: Any, module: TrainedModule) -> None:
        """Log the epoch, keep its weights if they are the best, and write the state."""
        row = self._row(trainer, module)
        best = self._is_best(row)
        self.rows.append(row)
        self.finished = trainer.should_stop or trainer.current_epoch + 1 >= self.settings.epochs
        if best:
            self.best_epoch = trainer.current_epoch
        if self.folder is None:
            if best and self.monitored in row and trainer.is_global_zero:
                self.best_weights = {name: x.detach().cpu().clone() for name, x in module.state_dict().items()}
        else:
            # The best state first: a run that is killed between the two repeats this epoch, and writes both again.
            if best and trainer.is_global_zero:
                write_state(self.folder / "state" / _BEST, {"state_dict": module.state_dict()})
            trainer.save_checkpoint(self.folder / "state" / _LAST)
            if trainer.is_global_zero:
                write_log(self.folder / _LOG, self.rows)
                if self._board is not None:
                    self._board.add(row)
        if self.progress is not None and trainer.is_global_zero:
            self.progress.epoch_done(row, best)

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _row(self, trainer: Any, module: TrainedModule) -> dict[str, float]:
        losses = _mean_of_all_processes(module.losses)
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step, "lr": self._rate}
        row |= {"train_loss": losses} | {f"validation_{name}": value for name, value in module.found.items()}
        return row | {"seconds": round(time.perf_counter() - self._since, 3)}

    def _is_best(self, row: dict[str, float]) -> bool:
        if self.monitored not in row or not self.rows:
            return True
        best, now = self.rows[self.best_epoch][self.monitored], row[self.monitored]
        return now > best if self.mode == "max" else now < best


def _mean_of_all_processes(losses: list[torch.Tensor]) -> float:
    """Return the mean of the batches' losses over all processes."""
    mean = torch.stack(losses).double().mean() if losses else torch.tensor(float("nan"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mean = mean.float()
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return float(mean)


def loader_of(dataset: Any, settings: FitSettings, **how: Any) -> DataLoader[Any]:
    """Return a loader with its own random generator, so that it does not advance torch's."""
    workers = settings.workers
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        **how,
    )


def _accelerator(settings: FitSettings, some_unused: bool) -> dict[str, Any]:
    """Return Lightning's arguments for the devices and the strategy of sharing work among processes.

    Raises:
        ValueError: there is no such device.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        usable = "cpu, cuda" if torch.cuda.is_available() else "cpu: torch finds no GPU"
        raise ValueError(f"--device must be auto or one that torch can use ({usable}), got {settings.device!r}")
    if index and settings.devices > 1:
        raise ValueError(
            f"--devices N takes the first N GPUs, got --devices {settings.devices} with --device {name}; give one of "
            "them, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if kind == "cuda" and max(int(index or 0) + 1, settings.devices) > torch.cuda.device_count():
        raise ValueError(
            f"each process trains on its own GPU, got --device {name} --devices {settings.devices} where torch finds "
            f"{torch.cuda.device_count()}; ask for fewer"
        )
    devices: Any = [int(index)] if index else settings.devices
    strategy = "ddp_find_unused_parameters_true" if some_unused else "ddp"
    strategy = strategy if settings.devices > 1 else "auto"
    return {"accelerator": "gpu" if kind == "cuda" else "cpu", "devices": devices, "strategy": strategy}


def _precision(settings: FitSettings, accelerator: str) -> str:
    if settings.precision == "16" and accelerator == "cpu":
        raise ValueError("--precision 16 needs a GPU, got a CPU; take bf16 or 32")
    return {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[settings.precision]
