"""Layers and models that stay packed: multi-head attention, the vision transformer and the slide model."""

from maskattn.nn.adapters import from_timm, from_transformers, register_attention
from maskattn.nn.multihead import MultiheadAttention
from maskattn.nn.replace import replace_attention
from maskattn.nn.slide_model import SlideModel, SlideModelConfig
from maskattn.nn.vit import VisionTransformer

__all__ = [
    "MultiheadAttention",
    "SlideModel",
    "SlideModelConfig",
    "VisionTransformer",
    "from_timm",
    "from_transformers",
    "register_attention",
    "replace_attention",
]
