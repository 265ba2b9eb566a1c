"""A run of three slides, one of them of an evil name and one broken, for what reads runs."""

from __future__ import annotations

from pathlib import Path

from small_slides import small_model, write_slide

from maskattn.slide.manifest import SlideJob
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides

EVIL = "<img src=x onerror=alert(1)> & 'q' \"ü\" ]]>--><script>"


def write_run(folder: Path) -> Path:
    """The folder of the run's outputs."""
    slide = write_slide(folder / "disc.tiff")
    broken = folder / "broken.tiff"
    broken.write_bytes(b"no slide")
    jobs = [SlideJob("plain", slide), SlideJob(EVIL, slide), SlideJob("broken", broken)]
    run_slides(jobs, small_model(), RunSettings(folder / "out", tokens=True, batch_size=8))
    return folder / "out"
