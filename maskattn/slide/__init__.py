"""Slides: reading, tissue, token grids, the stream of tiles, the pipeline and its outputs.

Level-0 pixels (``_lv0``) are the one coordinate system of all modules; spacing (``spacing_um``) is µm per pixel.
"""
