"""GeoJSON as QuPath and TRIDENT write it, in level-0 pixels: read as masks, and written as the objects of a map."""
