"""Models that stay packed: the vision transformer and the slide model."""

from maskattn.nn.slide_model import SlideModel, SlideModelConfig
from maskattn.nn.vit import VisionTransformer

__all__ = ["SlideModel", "SlideModelConfig", "VisionTransformer"]
