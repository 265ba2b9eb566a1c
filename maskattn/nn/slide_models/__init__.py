"""Slide models: heads that read a slide's tile embeddings, the layouts of their checkpoints, and models as folders.

This module does not import torch, so that a model's card can be read without delay. The public names are in
:mod:`maskattn.nn`.
"""
