"""Masks drawn by users: lossless decoding of image files, and interpretation of their values, colours and alpha."""
