"""``maskattn demo``: predicts a slide with a known answer with the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskattn.cli import slide_runs
from maskattn.cli.imports import imports
from maskattn.cli.options import Debug
from maskattn.cli.reporting import errors_in_one_line, say

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of outputs; created if it does not exist.")] = Path(
        "demo_out"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the slide that is drawn.", min=0)] = 0,
    debug: Debug = False,
) -> None:
    """Predict a synthetic slide with a known answer.

    The slide is drawn, the bundled model predicts it, and every output is written.
    """
    with errors_in_one_line(debug):
        with imports():
            from maskattn.cli.progress import lines_of_prediction, scores_of
            from maskattn.demo.synthetic import CLASSES, make_slide, write_slide
            from maskattn.files import replacing
            from maskattn.nn.kept_memory import keeping_memory
            from maskattn.slide.manifest import SlideJob
            from maskattn.slide.output_folder import prepare_output
            from maskattn.slide.request import RunSettings

        prepare_output(out)
        path = out / f"synthetic_{seed}.tiff"
        with keeping_memory():
            slide = make_slide(seed)
            with replacing(path) as temporary:
                write_slide(slide, temporary)
        settings = RunSettings(out, tokens=True, overwrite=True)
        work = slide_runs.Inference([SlideJob(path.stem, path)], slide_runs.Chosen(), settings)
        outcome = slide_runs.run(work, slide_runs.Where(), lines_of_prediction)[0]
    if outcome.prediction is None:
        raise typer.Exit(1)
    say(f"slide       {path}")
    for name in sorted(entry.name for entry in (out / path.stem).iterdir()):
        say(f"output      {out / path.stem / name}")
    say(f"summary     {out / 'summary.csv'}")
    say(f"known       {CLASSES[slide.label]}")
    say(f"predicted   {outcome.prediction.prediction} ({scores_of(outcome.prediction)})")
