"""Tile sizes, a table for each family of kernels, and the one way to look them up."""
