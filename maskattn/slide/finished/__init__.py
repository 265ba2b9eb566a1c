"""Read the results in a run's output folder back for reports and the viewer. Nothing here imports torch."""

from maskattn.slide.finished.map_table import MapTable, open_maps
from maskattn.slide.finished.mosaic import Mosaic, build_mosaic
from maskattn.slide.finished.run_folder import FinishedRun, FinishedSlide, open_slide, read_run

__all__ = [
    "FinishedRun",
    "FinishedSlide",
    "MapTable",
    "Mosaic",
    "build_mosaic",
    "open_maps",
    "open_slide",
    "read_run",
]
