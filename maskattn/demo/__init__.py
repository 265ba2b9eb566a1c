"""The bundled demonstration: synthetic slides with a known answer, and a small slide model trained on them.

Nothing here is a diagnosis: the classes exist only in the synthetic slides, and the bundled model was trained on no
others.
"""
