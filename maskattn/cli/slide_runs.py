"""What the commands that predict slides share: the model, and the run under progress bars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskattn.cli.reporting import tell

if TYPE_CHECKING:
    from maskattn.nn.slide_model import SlideModel
    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.prediction import SlideOutcome
    from maskattn.slide.request import RunSettings

__all__ = ["BUNDLED", "device_named", "load_model", "run"]

BUNDLED = Path(__file__).parents[1] / "demo" / "model.safetensors"


def load_model(path: Path, impl: str | None, device: str) -> SlideModel:
    """The slide model on its device, after a trial of the attention it will use.

    Raises:
        FileNotFoundError, ValueError: there is no such model, device or implementation.
    """
    from maskattn.nn.slide_model import SlideModel

    return SlideModel.load(path, impl=impl, device=device_named(device, impl))


def device_named(device: str, impl: str | None) -> str:
    """The device that is asked for, after a trial of it and of the attention that is to run there.

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


def run(jobs: list[SlideJob], model: SlideModel, settings: RunSettings) -> list[SlideOutcome]:
    """Run the slides; a demonstration model says what it is."""
    from maskattn.cli.progress import ProgressBars, lines_of_prediction
    from maskattn.slide.run import run_slides

    config = model.config
    if config.demonstration:
        tell(f"{config.name}: {config.note}")
    with ProgressBars(len(jobs), lines_of_prediction) as bars:
        return run_slides(jobs, model, settings, bars)
