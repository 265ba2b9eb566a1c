"""Layers and models that stay packed: multi-head attention, the vision transformer and the slide model."""

from maskattn.nn.adapters import from_timm, from_transformers, register_attention
from maskattn.nn.checkpoints import from_state_dict, load_vit
from maskattn.nn.hipt import HIPT
from maskattn.nn.layer_groups import layer_groups
from maskattn.nn.multihead import MultiheadAttention
from maskattn.nn.random_masks import drop_random_tokens
from maskattn.nn.replace import replace_attention
from maskattn.nn.slide_encoders import encode_placed_tiles, from_gigapath, from_titan
from maskattn.nn.slide_model import SlideModel, SlideModelConfig
from maskattn.nn.vit import VisionTransformer

__all__ = [
    "HIPT",
    "MultiheadAttention",
    "SlideModel",
    "SlideModelConfig",
    "VisionTransformer",
    "drop_random_tokens",
    "encode_placed_tiles",
    "from_gigapath",
    "from_state_dict",
    "from_timm",
    "from_titan",
    "from_transformers",
    "layer_groups",
    "load_vit",
    "register_attention",
    "replace_attention",
]
