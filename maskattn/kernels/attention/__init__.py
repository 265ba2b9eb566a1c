"""Attention of many queries: forward, both passes of the backward, dense tensors, and rows by index."""
