"""Maps as pyramids of images that lie on a slide's level 0: OME-TIFF and OME-Zarr."""
