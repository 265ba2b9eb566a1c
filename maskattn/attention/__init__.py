"""Masked attention: the public operations, their specification and their registration with torch."""

from maskattn.attention.api import masked_attention, packed_attention, readout, token_relevance

__all__ = ["masked_attention", "packed_attention", "readout", "token_relevance"]
