"""Ahead-of-time compilation of the shipped kernel configurations, without a GPU: ``python -m bench.aot.report``."""
