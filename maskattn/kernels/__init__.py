"""Triton kernels, one operation per file; ``tiles.py`` and ``scores.py`` are shared, ``configs.py`` chooses."""
