"""Slides: reading, tissue, token grids, the stream of tiles, the pipeline and its outputs.

Level-0 pixels (``_lv0``) are the one coordinate system between the parts; spacing is µm per pixel (``spacing_um``).
"""
