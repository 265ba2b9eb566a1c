"""The forward kernel for Hopper (compute capability 9.0) in Gluon, Triton's language of layouts, barriers and warps."""
