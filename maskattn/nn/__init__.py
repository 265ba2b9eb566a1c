"""Layers and models that work on packed tokens: multi-head attention, vision transformers, tile encoders, slide models.

The public names are imported on first use, so that the table of encoders can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskattn.first_use import imported_on_first_use

if TYPE_CHECKING:
    from maskattn.nn.adapters import from_timm, from_transformers, register_attention
    from maskattn.nn.checkpoints import from_state_dict, load_vit
    from maskattn.nn.encoders.loading import load_encoder
    from maskattn.nn.encoders.tile_encoder import TileEncoder
    from maskattn.nn.hipt import HIPT
    from maskattn.nn.hipt_checkpoints import load_hipt
    from maskattn.nn.multihead import MultiheadAttention
    from maskattn.nn.optimizer_groups import layer_groups
    from maskattn.nn.random_masks import drop_random_tokens
    from maskattn.nn.region_model import RegionModel
    from maskattn.nn.replace import replace_attention
    from maskattn.nn.slide_encoders import encode_placed_tiles, from_gigapath, from_titan
    from maskattn.nn.slide_model import SlideModel, SlideModelConfig
    from maskattn.nn.slide_models.best_instance import BestInstanceHead
    from maskattn.nn.slide_models.card import EncoderFacts, ModelCard
    from maskattn.nn.slide_models.folder import load_two_stages, save_model
    from maskattn.nn.slide_models.gated_attention import GatedAttentionHead
    from maskattn.nn.slide_models.head import SlideHead, TileGrid
    from maskattn.nn.slide_models.hipt import HIPTHead
    from maskattn.nn.slide_models.layouts import load_slide_head
    from maskattn.nn.slide_models.pooling import PooledHead
    from maskattn.nn.slide_models.transmil import TransMILHead
    from maskattn.nn.slide_models.two_stage import TwoStageModel
    from maskattn.nn.slide_models.vit import ViTHead
    from maskattn.nn.vit import VisionTransformer

__all__ = [
    "HIPT",
    "EncoderFacts",
    "BestInstanceHead",
    "GatedAttentionHead",
    "HIPTHead",
    "ModelCard",
    "MultiheadAttention",
    "PooledHead",
    "RegionModel",
    "SlideHead",
    "SlideModel",
    "SlideModelConfig",
    "TileEncoder",
    "TileGrid",
    "TransMILHead",
    "TwoStageModel",
    "ViTHead",
    "VisionTransformer",
    "drop_random_tokens",
    "encode_placed_tiles",
    "from_gigapath",
    "from_state_dict",
    "from_timm",
    "from_titan",
    "from_transformers",
    "layer_groups",
    "load_encoder",
    "load_hipt",
    "load_slide_head",
    "load_two_stages",
    "load_vit",
    "register_attention",
    "replace_attention",
    "save_model",
]

_HOME = {
    "EncoderFacts": "slide_models.card",
    "BestInstanceHead": "slide_models.best_instance",
    "GatedAttentionHead": "slide_models.gated_attention",
    "HIPTHead": "slide_models.hipt",
    "HIPT": "hipt",
    "ModelCard": "slide_models.card",
    "MultiheadAttention": "multihead",
    "PooledHead": "slide_models.pooling",
    "RegionModel": "region_model",
    "SlideHead": "slide_models.head",
    "SlideModel": "slide_model",
    "SlideModelConfig": "slide_model",
    "TileEncoder": "encoders.tile_encoder",
    "TileGrid": "slide_models.head",
    "TransMILHead": "slide_models.transmil",
    "TwoStageModel": "slide_models.two_stage",
    "ViTHead": "slide_models.vit",
    "VisionTransformer": "vit",
    "drop_random_tokens": "random_masks",
    "encode_placed_tiles": "slide_encoders",
    "from_gigapath": "slide_encoders",
    "from_state_dict": "checkpoints",
    "from_timm": "adapters",
    "from_titan": "slide_encoders",
    "from_transformers": "adapters",
    "layer_groups": "optimizer_groups",
    "load_encoder": "encoders.loading",
    "load_hipt": "hipt_checkpoints",
    "load_slide_head": "slide_models.layouts",
    "load_two_stages": "slide_models.folder",
    "load_vit": "checkpoints",
    "register_attention": "adapters",
    "replace_attention": "replace",
    "save_model": "slide_models.folder",
}

__getattr__, __dir__ = imported_on_first_use(__name__, _HOME)
