"""What users do with a slide file, done with one that may be damaged, and the outcomes that are allowed.

A file may be read, or refused in one sentence of the form "rule, got what came; remedy". Whatever else comes of it is a
fault: another exception, an unclear message, an output that is not whole, a file left over, memory out of proportion.
Crashes and hangs are seen by the process that started this one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import tempfile
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import h5py
import torch
from fuzz_pool import family
from PIL import Image
from small_slides import small_model

from maskattn.errors import OutputError, SlideError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.manifest import SlideJob
from maskattn.slide.overlay import write_mask_overlay
from maskattn.slide.pipeline import RunSettings, predict_slide
from maskattn.slide.prediction import read_prediction
from maskattn.slide.reader import SlideReader
from maskattn.slide.tissue import find_tissue

MEMORY_MB = 2048
SPACING_UM = 1.0
PREDICTION = {
    *("attention.png", "features.h5", "heatmap_benign.png", "heatmap_low_high.png", "prediction.json", "relevance.h5")
}
CLEAR = re.compile(r"[^\n]+[,;] got [^\n]+; [^\n]+")


@dataclass(frozen=True)
class Examination:
    """The task: open ``path``, and predict it too if asked; ``work`` is an empty folder for whatever is written."""

    path: Path
    work: Path
    seed: int
    predict: bool


@dataclass(frozen=True)
class Finding:
    """``outcome``: "read", "in part" (some of it was refused), "refused" (not opened), or the name of a fault.

    ``stage``: how far the file came; ``detail``: why.
    """

    outcome: str
    stage: str
    detail: str = ""


class FaultError(Exception):
    """An outcome that no file may have."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


def examine(task: Examination) -> Finding:
    """Do with a file what users do, and return the outcome."""
    torch.set_num_threads(1)
    held, reaped = start_of_memory(), ended_peak_mb()
    temporary, out = task.work / "tmp", task.work / "out"
    temporary.mkdir()
    out.mkdir()
    usual, tempfile.tempdir = tempfile.tempdir, str(temporary)
    stages = ["open"]
    try:
        refusal = use(task, out, stages)
        check_nothing_left(out, temporary)
        taken = memory_mb("VmHWM") - held
        if ended_peak_mb() > reaped:
            taken = max(taken, ended_peak_mb())
        if taken > MEMORY_MB:
            raise FaultError("memory", f"{taken} MB were taken")
    except FaultError as fault:
        return Finding(fault.outcome, stages[-1], str(fault))
    except MemoryError:
        return Finding("memory", stages[-1], traceback.format_exc(limit=-4))
    except Exception as error:  # what users would see as a traceback, or as a line that says nothing
        return Finding("exception", stages[-1], f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}")
    finally:
        tempfile.tempdir = usual
    if stages[-1] == "open":
        return Finding("refused", "open", refusal)
    return Finding("in part" if refusal else "read", stages[-1], refusal)


def use(task: Examination, out: Path, stages: list[str]) -> str:
    """Run every stage; return why the file was refused, or an empty string if all of it could be used."""
    refusals = []
    spacing_um = None
    try:
        with SlideReader(task.path, isolated=True) as reader:
            stages.append("describe")
            described = reader.describe()
            check_clear(described["spacing"].removeprefix("unknown: "), described["spacing"].startswith("unknown"))
            json.dumps(described, allow_nan=False)
            stages.append("spacing")
            if described["spacing"].startswith("unknown"):
                spacing_um = SPACING_UM
                refusals.append(described["spacing"])
    except SlideError as error:
        return clear(error)
    for stage, step in (("tissue", show_tissue), ("tiles", read_tiles), ("predict", predict)):
        if stage == "predict" and not task.predict:
            continue
        stages.append(stage)
        try:
            step(task, spacing_um, out)
        except (SlideError, OutputError, ValueError) as error:
            refusals.append(clear(error))
    return "\n".join(refusals)


def show_tissue(task: Examination, spacing_um: float | None, out: Path) -> None:
    path = out / "tissue.png"
    try:
        with SlideReader(task.path, spacing_um, isolated=True) as reader:
            found = find_tissue(reader)
            write_mask_overlay(path, reader.thumbnail(2048), found, reader.info.width_px)
    finally:
        check_folder(out, {"tissue.png"} if path.exists() else set())
    with Image.open(path) as image:
        image.load()
    path.unlink()


def read_tiles(task: Examination, spacing_um: float | None, out: Path) -> None:
    """Tiles at the corners, across every edge, beyond, of every level and of all of the slide; refused ones too."""
    rng = Random(task.seed)
    refusals: list[Exception] = []
    with SlideReader(task.path, spacing_um, isolated=True) as reader:
        width, height = reader.info.width_px, reader.info.height_px
        places = [(0, 0), (width - 100, height - 100), (-50, -50), (width + 10, 0), (0, -3000), (width - 1, height - 1)]
        places += [(rng.randrange(-100, width + 100), rng.randrange(-100, height + 100)) for _ in range(4)]
        asked = [(x, y, (size, size)) for x, y in places for size in (64, 256)]
        asked += [(0, 0, (min(width, 4096), min(height, 4096))), (-10, -10, (min(3 * width, 30_000), 700))]
        for x, y, size in asked:
            try:
                rgb = reader.read_region(x, y, size, (64, 48))
            except SlideError as error:
                refusals.append(error)
                clear(error)
                continue
            if rgb.shape != (48, 64, 3) or rgb.dtype != "uint8":
                raise FaultError("wrong result", f"a tile of {rgb.shape}, {rgb.dtype}")
            beyond = x >= width or y >= height or x + size[0] <= 0 or y + size[1] <= 0
            if beyond and rgb.min() < 255:
                raise FaultError("wrong result", f"what lies beyond the slide is not white at {x}, {y}")
    if refusals:
        raise refusals[0]


def predict(task: Examination, spacing_um: float | None, out: Path) -> None:
    job = SlideJob("slide", task.path, spacing_um=spacing_um)
    tokens = task.seed % 2 == 0
    try:
        prediction = predict_slide(job, slide_model(), RunSettings(out, batch_size=8, tokens=tokens))
    except BaseException:
        check_folder(out, set())
        raise
    check_folder(out, {"slide"})
    check_folder(out / "slide", PREDICTION)
    if read_prediction(out / "slide" / "prediction.json") != prediction:
        raise FaultError("half output", "prediction.json is not what was returned")
    for path in (out / "slide").iterdir():
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                file.visititems(lambda _, item: item[()] if isinstance(item, h5py.Dataset) else None)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    shutil.rmtree(out / "slide")


@cache
def slide_model() -> SlideModel:
    return small_model()


def clear(error: Exception) -> str:
    """The error's message, which must be one sentence with the rule, what came and the remedy."""
    if not isinstance(error, SlideError | OutputError) and not CLEAR.fullmatch(str(error)):
        raise error
    check_clear(str(error), True)
    return str(error)


def check_clear(message: str, is_message: bool) -> None:
    if is_message and not (CLEAR.fullmatch(message) and len(message) < 1000 and message.isprintable()):
        raise FaultError("unclear message", message)


def check_folder(folder: Path, names: set[str]) -> None:
    there = {path.name for path in folder.iterdir()}
    if there != names:
        raise FaultError("half output", f"{sorted(there)} in place of {sorted(names)}")


def check_nothing_left(*folders: Path) -> None:
    left = sorted(str(path.name) for folder in folders for path in folder.rglob("*"))
    if left:
        raise FaultError("half output", f"left over: {left}")


def start_of_memory() -> int:
    """MB that this process and those it started hold; the kernel's mark of the most they held is set back to that."""
    for pid in family(os.getpid()):
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def memory_mb(name: str) -> int:
    """The memory of this process and those it started."""
    said = [Path(f"/proc/{pid}/status").read_text() for pid in family(os.getpid())]
    return sum(int(kilobytes) for text in said for kilobytes in re.findall(rf"{name}:\s+(\d+) kB", text)) // 1024


def ended_peak_mb() -> int:
    """The most that any process held which this one started and which has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
