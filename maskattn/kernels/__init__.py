"""Triton kernels.

``language/`` is what every kernel is written with, the score and the softmax among it; ``attention/`` and ``readout/``
are the kernels, an operation a file with its launcher; ``launch/`` is what launchers share; ``tables/`` has tile sizes.
"""
