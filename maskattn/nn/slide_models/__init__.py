"""Slide models: heads that read a slide's tile embeddings, the layouts of their checkpoints, and models as folders.

Nothing here imports torch by itself, so that what a model says of itself is read at once; :mod:`maskattn.nn` has the
public names.
"""
