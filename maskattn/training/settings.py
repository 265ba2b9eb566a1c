"""What ``maskattn train`` is asked for; every field is a flag and a key of run.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from maskattn.training.fit_settings import FitSettings
from maskattn.training.slide_settings import SlideSettings
from maskattn.training.tile_settings import TileSettings

__all__ = ["TrainSettings"]


# Fields come in the order of the flags: those of the last base first.
@dataclass(frozen=True, kw_only=True)
class TrainSettings(FitSettings, TileSettings, SlideSettings):
    """The training of a model: data, task and model, then the loop and the optimiser."""
