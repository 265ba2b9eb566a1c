"""What the shipped kernel configurations compile to, without a GPU: ``python bench/aot_report.py``."""
