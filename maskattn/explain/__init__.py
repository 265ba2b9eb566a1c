"""Explanations: attention maps, class-discriminative attention maps, and their hierarchical form for slides."""

from maskattn.explain.attention_maps import AttentionMap
from maskattn.explain.averaged_cdam import IntegratedCDAM, SmoothCDAM
from maskattn.explain.cdam import CDAM
from maskattn.explain.concepts import Concept
from maskattn.explain.factorised import FactorisedAttention, FactorisedMaps
from maskattn.explain.hierarchical import HierarchicalCDAM, RelevanceMap, TokenMaps
from maskattn.explain.three_levels import RegionMaps, ThreeLevelCDAM

__all__ = [
    "AttentionMap",
    "CDAM",
    "Concept",
    "FactorisedAttention",
    "FactorisedMaps",
    "HierarchicalCDAM",
    "IntegratedCDAM",
    "RegionMaps",
    "RelevanceMap",
    "SmoothCDAM",
    "ThreeLevelCDAM",
    "TokenMaps",
]
