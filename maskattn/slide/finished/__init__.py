"""What runs left in their folder of outputs, read back for reports and the viewer. Nothing here imports torch."""

from maskattn.slide.finished.colours import COLOUR_MAPS, colour_table, coloured, positions_of
from maskattn.slide.finished.map_table import MapTable, open_maps
from maskattn.slide.finished.mosaic import Mosaic, build_mosaic
from maskattn.slide.finished.run_folder import FinishedRun, FinishedSlide, open_slide, read_run

__all__ = [
    "COLOUR_MAPS",
    "FinishedRun",
    "FinishedSlide",
    "MapTable",
    "Mosaic",
    "build_mosaic",
    "colour_table",
    "coloured",
    "open_maps",
    "open_slide",
    "positions_of",
    "read_run",
]
