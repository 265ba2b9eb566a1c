"""Outputs of a slide, one module per output. :data:`SINKS` lists them, and no other module names one."""

from __future__ import annotations

from maskattn.slide.sinks.features import Features
from maskattn.slide.sinks.geojson import GeoJson
from maskattn.slide.sinks.heatmaps import Heatmaps
from maskattn.slide.sinks.pyramids import Pyramids
from maskattn.slide.sinks.relevance import Relevance
from maskattn.slide.sinks.sink import ExplainedSlide, ExplainedTiles, Sink

__all__ = ["SINKS", "ExplainedSlide", "ExplainedTiles", "Sink"]

SINKS: tuple[Sink, ...] = (Features(), Relevance(), Heatmaps(), GeoJson(), Pyramids())
