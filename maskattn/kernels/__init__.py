"""Triton kernels.

``language/`` holds the device functions that all kernels share, such as the score and the softmax. ``attention/`` and
``readout/`` hold the kernels, one file for each operation, with its launcher. ``launch/`` holds what the launchers
share, and ``tables/`` the tile sizes.
"""
