"""Write maps as image pyramids in the frame of a slide's level 0: OME-TIFF and OME-Zarr."""
