"""The kernels for Hopper (compute capability 9.0) in Gluon, Triton's language of layouts, barriers and warps.

No GPU has run them: they are simulated and compiled ahead of time.
"""
