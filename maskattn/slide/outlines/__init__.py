"""Read GeoJSON of QuPath and TRIDENT as masks, and write maps as objects for QuPath; all in level-0 pixels."""
