"""The embedded default: synthetic slides with a known answer, and a small slide model trained on them.

Nothing here is a diagnosis: the classes are the synthetic slides' own, and the bundled model knows no other slide.
"""
