"""Training of slide models and of tile encoders, from a table of labels to a model folder.

Nothing here imports torch, Lightning or pydantic before it is used, so that the command line can read the settings.
"""
