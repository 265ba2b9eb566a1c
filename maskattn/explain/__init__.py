"""Explanations: attention maps, class-discriminative attention maps, and their hierarchical form for slides.

The public names are imported on first use, so that the list of methods can be read without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskattn.first_use import imported_on_first_use

if TYPE_CHECKING:
    from maskattn.explain.attention_maps import AttentionMap
    from maskattn.explain.cdam import CDAM
    from maskattn.explain.concepts import Concept
    from maskattn.explain.explainer import Explainer
    from maskattn.explain.factorised import FactorisedAttention, FactorisedMaps
    from maskattn.explain.hierarchical import HierarchicalCDAM, RelevanceMap, TokenMaps
    from maskattn.explain.integrated import IntegratedCDAM
    from maskattn.explain.methods import METHODS
    from maskattn.explain.slide_heads import SlideHeadCDAM
    from maskattn.explain.smooth import SmoothCDAM
    from maskattn.explain.three_levels import RegionMaps, ThreeLevelCDAM

__all__ = [
    "AttentionMap",
    "CDAM",
    "Concept",
    "Explainer",
    "FactorisedAttention",
    "FactorisedMaps",
    "HierarchicalCDAM",
    "IntegratedCDAM",
    "METHODS",
    "RegionMaps",
    "RelevanceMap",
    "SlideHeadCDAM",
    "SmoothCDAM",
    "ThreeLevelCDAM",
    "TokenMaps",
]

_HOME = {
    "AttentionMap": "attention_maps",
    "CDAM": "cdam",
    "Concept": "concepts",
    "Explainer": "explainer",
    "FactorisedAttention": "factorised",
    "FactorisedMaps": "factorised",
    "HierarchicalCDAM": "hierarchical",
    "IntegratedCDAM": "integrated",
    "METHODS": "methods",
    "RegionMaps": "three_levels",
    "RelevanceMap": "hierarchical",
    "SlideHeadCDAM": "slide_heads",
    "SmoothCDAM": "smooth",
    "ThreeLevelCDAM": "three_levels",
    "TokenMaps": "hierarchical",
}

__getattr__, __dir__ = imported_on_first_use(__name__, _HOME)
