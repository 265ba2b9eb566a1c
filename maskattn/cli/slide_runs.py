"""Functions shared by the commands that run slides: loading the model, and the run under progress bars."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from maskattn.cli.concepts import load_concept_model
from maskattn.cli.free_memory import PROCESS_GIB
from maskattn.cli.imports import imports
from maskattn.cli.reporting import say, tell
from maskattn.cli.side_by_side import is_small_model, processes_for
from maskattn.slide.fleet.sharing import bytes_of, chosen_jobs

if TYPE_CHECKING:
    from maskattn.cli.device_member import Run, Work
    from maskattn.explain.text_concepts import TextConcepts
    from maskattn.nn.slide_models.two_stage import TwoStageModel
    from maskattn.slide.each_slide import OutcomeT
    from maskattn.slide.extract_request import ExtractSettings
    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.outcome import Outcome
    from maskattn.slide.prediction import SlideOutcome
    from maskattn.slide.request import RunSettings

__all__ = [
    "BUNDLED",
    "Chosen",
    "Inference",
    "Where",
    "device_named",
    "end",
    "jobs_asked_for",
    "load_model",
    "run",
    "start_reading",
]

BUNDLED = Path(__file__).parents[1] / "demo" / "model"

# oneDNN keeps each product that it has compiled for a number of rows, half a megabyte, and 1,024 unless told. Masked
# batches have many numbers of rows; with so few, they are as fast. It reads the variable at its first product.
_PRODUCTS_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# Torch's threads spin for a while after each operation. The bundled model's operations are so short that its threads
# would spin for most of the time, on cores that decode tiles and draw pictures; large encoders are slower without.
_THREADS_SLEEP = ("OMP_WAIT_POLICY", "passive")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The choice of a slide model and a tile encoder for a command.

    Attributes:
        model: a folder, a checkpoint, or NAME.safetensors.
        encoder: as listed by ``maskattn encoders``; None is the model's own, or the one that it names.
        weights: a file of the encoder's weights.
        num_heads: attention heads of an encoder that is a file of weights.
        trust_code: run the code in an encoder's repository.
        classes: names of the logits, for a model without them.
        patch_px: side of a tile in px.
        spacing_um: µm per px of a tile.
        token_mask: "none" or "tissue".
        with_features: features are given, so that an encoder is needed only for token maps.
        other_encoder: accept an encoder other than the one that the model was trained with.
    """

    model: Path = BUNDLED
    encoder: str | None = None
    weights: Path | None = None
    num_heads: int | None = None
    trust_code: bool = False
    classes: tuple[str, ...] | None = None
    patch_px: int | None = None
    spacing_um: float | None = None
    token_mask: str | None = None
    with_features: bool = False
    other_encoder: bool = False


def load_model(chosen: Chosen, impl: str | None, device: str) -> TwoStageModel:
    """Load the slide model on its device, after testing the attention implementation there.

    Raises:
        FileNotFoundError, ValueError: there is no such model, device or implementation, or no encoder for the model.
    """
    from maskattn.nn.encoders.loading import load_encoder
    from maskattn.nn.slide_models.card import CONFIG, read_card
    from maskattn.nn.slide_models.folder import load_two_stages

    device, name = device_named(device, impl), chosen.encoder
    if name is None and not chosen.with_features and (chosen.model / CONFIG).is_file():
        card = read_card(chosen.model)
        if card.kind != "slide_model" and card.encoder is not None:
            name = card.encoder.name
    encoder = None
    if name is not None:
        encoder = load_encoder(
            name,
            device=device,
            impl=impl,
            weights=chosen.weights,
            num_heads=chosen.num_heads,
            trust_code=chosen.trust_code,
        )
    model = load_two_stages(
        chosen.model,
        encoder,
        classes=chosen.classes,
        patch_px=chosen.patch_px,
        spacing_um=chosen.spacing_um,
        token_mask=chosen.token_mask,
        other_encoder=chosen.other_encoder,
        impl=impl,
        device=device,
    )
    if model.why_no_tiles and not chosen.with_features:
        raise ValueError(model.why_no_tiles)
    return model


def device_named(device: str, impl: str | None) -> str:
    """Return the requested device, after testing it and the attention implementation on it.

    Raises:
        ValueError: there is no such device or implementation.
    """
    import torch

    from maskattn.doctor import try_attention

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be auto, or one that torch can use, got {device!r}: {error}") from error
    if impl is not None:
        try_attention(impl, device)
    return device


def jobs_asked_for(
    slides: list[str] | None, manifest: Path | None, mask: str | None, features: Path | None = None
) -> tuple[list[SlideJob], list[str]]:
    """Return the jobs of a command's slides, and the notes on finding them, which are also printed.

    Args:
        slides: files, folders, globs, URLs or manifests.
        manifest: an additional manifest.
        mask: a mask, if there is exactly one slide.
        features: a folder of features, whose slides are run if no others are named.

    Raises:
        ManifestError: a slide or a manifest cannot be used, or a mask is given for more or less than one slide.
    """
    from maskattn.errors import ManifestError
    from maskattn.slide.manifest import collect_jobs
    from maskattn.slide.remote import locate

    notes: list[str] = []
    if features is not None and not slides and manifest is None:
        jobs = _jobs_of_features(features)
    else:
        jobs = collect_jobs(slides or (), notes.append, manifest)
    for note in notes:
        tell(note)
    if mask is None:
        return jobs, notes
    if len(jobs) != 1:
        raise ManifestError(f"--mask is for one slide, got {len(jobs)}; name masks in a manifest (mask_path)")
    mask_path, mask_origin = locate(mask)
    return [replace(jobs[0], mask_path=mask_path, mask_origin=mask_origin)], notes


def end(outcomes: Sequence[Outcome], out_dir: Path, what: str, notes: Iterable[str]) -> None:
    """Print how many slides have ``what``, and the notes; end the command with exit code 1 if a slide failed."""
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    say(f"{len(outcomes) - failed} of {len(outcomes)} slides have {what}; summary: {out_dir / 'summary.csv'}")
    for note in notes:
        say(note)
    if failed:
        raise typer.Exit(1)


def _jobs_of_features(folder: Path) -> list[SlideJob]:
    """Return a job for each slide that has features in a folder; the slides themselves are not read.

    Raises:
        ManifestError: there is no such folder, it has no features, or two slides have the same id.
    """
    from maskattn.errors import ManifestError, SlideError
    from maskattn.slide.layouts import list_features
    from maskattn.slide.layouts.hierarchical import list_regions
    from maskattn.slide.manifest import SlideJob

    found = list_regions(folder)
    try:
        found |= list_features(folder)
    except SlideError as error:
        if not found:
            raise ManifestError(str(error)) from error
    return [SlideJob(slide_id, path) for slide_id, path in found.items()]


def start_reading(
    jobs: Sequence[SlideJob],
    settings: RunSettings | ExtractSettings,
    spacing_um: float | None,
    *,
    alone: bool,
    finds_tissue: bool,
) -> None:
    """Start to read slides, while torch is imported and the model is loaded.

    Where an earlier run wrote a summary, all slides may be finished; reading then starts when it is needed.

    Args:
        jobs: the slides.
        settings: the request.
        spacing_um: µm per level-0 pixel of every slide, or None.
        alone: whether this process will run the first slide; otherwise only the process that decodes is started.
        finds_tissue: whether tissue is sought on slides without a mask.
    """
    from maskattn.slide.output_folder import may_be_finished

    if may_be_finished(settings.out_dir, settings.overwrite):
        return
    from maskattn.slide.formats.isolated_image import start_ahead
    from maskattn.slide.opened_ahead import open_ahead

    first = next(iter(chosen_jobs(jobs, settings.sharing)), None) if alone else None
    if first is None:
        start_ahead()
    else:
        sought = finds_tissue and first.mask_path is None
        tissue = (settings.ink, settings.force) if sought else None
        open_ahead(first, spacing_um, settings.series, tissue=tissue)


@dataclass(frozen=True)
class Inference:
    """The prediction of slides by a model, on any device.

    Attributes:
        jobs: the slides.
        chosen: the choice of the model.
        settings: the settings of the run.
        words: concepts that replace the model, or None.
        best_tiles: number of highest-scoring tiles that are pooled for each concept; None pools all.
        impl: the attention implementation; None takes the best.
    """

    jobs: list[SlideJob]
    chosen: Chosen
    settings: RunSettings
    words: TextConcepts | None = None
    best_tiles: int | None = None
    impl: str | None = None

    @property
    def out_dir(self) -> Path:
        """The output folder."""
        return self.settings.out_dir

    @property
    def process_gib(self) -> float | None:
        """Memory of each of several processes, if the model has a small encoder of its own."""
        chosen = self.chosen
        own = self.words is None and chosen.encoder is None and chosen.weights is None and not chosen.with_features
        return PROCESS_GIB if own and is_small_model(chosen.model) else None

    def under(self, settings: RunSettings) -> Inference:
        """Return the same work with other settings."""
        return replace(self, settings=settings)

    def on(self, device: str, *, alone: bool = False) -> tuple[str, Run[SlideOutcome]]:
        """Load the model on a device; return the note of a demonstration model, and what runs the slides."""
        if self.chosen.model == BUNDLED and self.words is None:
            os.environ.setdefault(*_THREADS_SLEEP)
        if self.settings.features_dir is None:
            settings = self.settings
            start_reading(self.jobs, settings, settings.spacing_um, alone=alone, finds_tissue=settings.masked)
        with imports():
            from maskattn.slide.run import run_slides

            if self.words is not None:
                model = load_concept_model(self.words, self.best_tiles, self.chosen, self.impl, device)
            else:
                model = load_model(self.chosen, self.impl, device)
        config = model.config
        note = f"{config.name}: {config.note}" if config.demonstration else ""
        return note, lambda progress, settings: run_slides(self.jobs, model, settings, progress)


@dataclass(frozen=True)
class Where:
    """The devices on which a command runs.

    Attributes:
        device: value of --device.
        devices: value of --devices, or None.
        engine: value of --engine.
        ray_address: value of --ray-address, or None.
        gpu_memory_gib: value of --gpu-memory-gib, or None.
        memory_gib: value of --memory-gib, or None.
    """

    device: str = "auto"
    devices: str | None = None
    engine: str = "local"
    ray_address: str | None = None
    gpu_memory_gib: float | None = None
    memory_gib: float | None = None

    def check(self) -> None:
        """Check that the options go together.

        Raises:
            ValueError: they do not.
        """
        if self.devices is not None and self.device != "auto":
            raise ValueError(
                f"--devices replaces --device, got --device {self.device} and --devices {self.devices}; give one of "
                "them"
            )
        if self.engine == "ray" and self.device != "auto":
            raise ValueError(
                f"--engine ray runs on the devices of all nodes, got --device {self.device}; leave it out, or give "
                "--devices cpu:N"
            )
        if self.engine != "ray" and (self.ray_address is not None or self.gpu_memory_gib is not None):
            given = "--gpu-memory-gib" if self.ray_address is None else "--ray-address"
            raise ValueError(f"{given} is an option of --engine ray, got it without; add --engine ray")
        if self.memory_gib is not None and (self.devices is None or self.engine == "ray"):
            raise ValueError(
                "--memory-gib is an option of --devices on one machine, got it "
                + ("with --engine ray; leave it out" if self.engine == "ray" else "without; add --devices")
            )


def run(work: Work[OutcomeT], where: Where, lines_of: Callable[[OutcomeT], list[str]]) -> list[OutcomeT]:
    """Run the slides of a command under progress bars: on one device, or in a process for each of several.

    Args:
        work: the work to run.
        where: the devices.
        lines_of: returns the lines that report a slide's outcome.

    Raises:
        ValueError: there is no such device, or options contradict each other.
    """
    os.environ.setdefault(*_PRODUCTS_KEPT)
    with imports():
        from maskattn.cli.progress import ProgressBars

    where.check()
    if where.engine == "ray":
        from maskattn.cli.ray_engine.run import RayOptions, run_on_ray

        return run_on_ray(RayOptions(where.ray_address, where.devices, where.gpu_memory_gib), work, lines_of)
    if named := _processes(work, where):
        from maskattn.cli.devices import run_on_devices

        with ProgressBars(len(work.jobs), lines_of, len(named)) as bars:
            return run_on_devices(named, work, [job.slide_id for job in work.jobs], bars)
    note, run_all = work.on(where.device, alone=True)
    if note:
        tell(note)
    with ProgressBars(len(work.jobs), lines_of) as bars:
        return run_all(bars, work.settings)


def _processes(work: Work[OutcomeT], where: Where) -> list[str]:
    """Return the devices of the processes that share the slides; none if this process runs them on one device."""
    if where.devices is not None:
        from maskattn.cli.devices import devices_named, within_memory

        return within_memory(devices_named(where.devices), where.memory_gib)
    process_gib = work.process_gib
    if where.device != "auto" or process_gib is None:
        return []
    jobs, limit = chosen_jobs(work.jobs, work.settings.sharing), work.settings.limit
    if any(job.is_remote for job in jobs):  # each process would load the model itself
        return []
    return processes_for([bytes_of(job.path) for job in jobs[:limit]], process_gib)
