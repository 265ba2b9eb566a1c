"""The settings of ``maskattn train``; every field is a flag and a key of run.yaml."""

from __future__ import annotations

from dataclasses import dataclass

from maskattn.training.fit_settings import FitSettings
from maskattn.training.slide_settings import SlideSettings
from maskattn.training.tile_settings import TileSettings

__all__ = ["TrainSettings"]


# The fields, and hence the flags, are in the order of the bases from last to first.
@dataclass(frozen=True, kw_only=True)
class TrainSettings(FitSettings, TileSettings, SlideSettings):
    """The settings of a training: data, task and model, then the loop and the optimiser."""
