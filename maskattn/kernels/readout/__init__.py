"""Attention of a few queries of each sequence, its backward, and token relevance."""
