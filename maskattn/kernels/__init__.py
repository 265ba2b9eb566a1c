"""Triton kernels, one operation per file; ``tiles.py`` holds what they share and ``configs.py`` their tile sizes."""
