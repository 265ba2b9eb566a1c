"""What the shipped kernel configurations compile to, without a GPU: ``python -m bench.aot.report``."""
