"""Explanations judged on real encoders, real photographs and real tissue.

    python -m bench.evidence.real --real DIR            # writes the first part of docs/evidence.md
    python -m bench.evidence.real --real DIR --quick    # two images of each kind, a trial of the bench alone

DIR holds material that cannot be distributed with the package (real_images.py describes it); missing material is
skipped and reported. Probes are trained on GlaS's training images, without the patients they are evaluated on; its test
folder is read only here. Everything is seeded. Results are cached image by image, so that an interrupted run resumes;
processor minutes are recorded there, too, and reported on the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.evidence.real_glass import attention_on_glass, edge_crops
from bench.evidence.real_judging import SLOW, gathered
from bench.evidence.real_progress import processor_seconds
from bench.evidence.real_rows import QUICK, Counts, Judged, photograph_rows, tissue_rows
from bench.evidence.real_slide import judge_slides
from bench.evidence.real_weights import ENCODERS, load_encoder, missing
from bench.evidence.table import Row, markdown_table, mean_and_error, write_section
from maskattn.explain import METHODS

HIGHER = ("contrast", "right side", "correctness", "box", "gland", "compactness", "correlation")
NOTEBOOK = {  # 1,000 ImageNet images, DINO ViT-S/8: compactness, correlation with token ablation
    "cdam": (0.838, 0.44),
    "token-ablation": (0.656, None),
    "attention": (0.543, 0.10),
    "relevance-propagation": (0.491, 0.34),
}


def table_of(judged: Judged, names: Sequence[str]) -> str:
    """Return a table with a row for each method and a column for each measure."""
    contrast = judged.measure("contrast")
    measures = {
        "contrast": contrast,
        "right side": [{name: float(value > 0) for name, value in row.items()} for row in contrast],
    }
    for name in ("correctness, drop", "box sensitivity", "gland AP", "compactness", "correlation with token ablation"):
        if rows := judged.measure(name):
            measures[name] = rows
    lines = []
    for name in [*names, "random"]:
        title = METHODS[name].title if name in METHODS else name
        lines.append(Row(title, {key: gathered(rows, name) for key, rows in measures.items()}))
    return markdown_table(lines, HIGHER)


def judged_images(judged: Judged, measure: str) -> str:
    """Return the number of images that the quick methods, and the slow ones, were judged on, in words."""
    rows = judged.measure(measure)
    slow = sum(not set(SLOW).isdisjoint(row) for row in rows)
    return f"{len(rows) - slow}{f' ({slow} for the slow methods)' if slow else ''}"


def of_photographs(judged: Judged, encoder: str, names: Sequence[str], counts: Counts) -> str:
    """Return the page's section on photographs."""
    return (
        f"### Two animals in a photograph, {encoder}\n\nThe animal's log-probability, two maps of each photograph; "
        f"{judged_images(judged, 'contrast')} maps, {judged_images(judged, 'correctness, drop')} of them by dropping, "
        f"{judged_images(judged, 'box sensitivity')} by {counts.boxes} boxes.\n\n" + table_of(judged, names)
    )


def of_tissue(judged: Judged, encoder: str, names: Sequence[str], counts: Counts) -> str:
    """Return the page's section on tissue."""
    assert judged.probe is not None, "tissue is judged through a probe"
    accuracy, area = judged.probe
    return (
        f"### Colon tissue, {encoder}\n\nThe probe is right on {accuracy:.3f} of the training squares and has an area "
        f"under the curve of {area:.3f}, each judged without its patient. {judged_images(judged, 'contrast')} "
        f"composites of the test folder, of two seeds; single squares, always of their own class: glands on "
        f"{judged_images(judged, 'gland AP')}, correctness on {judged_images(judged, 'correctness, drop')}, "
        f"{counts.boxes} boxes on {judged_images(judged, 'box sensitivity')}.\n\n" + table_of(judged, names)
    )


def beside_the_notebook(parts: dict[str, Judged]) -> str:
    """Return a table of the published notebook's figures and this package's."""
    names = list(parts)
    header = ["published", *names]
    lines = [
        "### Beside the published notebook\n",
        "| | "
        + " | ".join(f"{what}: {name}" for what in ("compactness", "like token ablation") for name in header)
        + " |",
        "|---" * (1 + 2 * len(header)) + "|",
    ]
    for method, published in NOTEBOOK.items():
        cells = []
        for number, measure in zip(published, ("compactness", "correlation with token ablation"), strict=True):
            cells.append("" if number is None else f"{number}")
            for name in names:
                mean, error = mean_and_error(gathered(parts[name].measure(measure), method))
                cells.append(f"{mean:.3f} ± {error:.3f}" if mean == mean else "")
        lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_minutes(cache: Path, page: Path | None, minutes: dict[str, float]) -> None:
    """Write the processor minutes of every part that was computed with this cache."""
    path = cache / "minutes.json"
    known = {**(json.loads(path.read_text()) if path.exists() else {}), **minutes}
    path.write_text(json.dumps(known))
    lines = [
        "| part | processor minutes |",
        "|---|---|",
        *(f"| {part} | {known[part]:.1f} |" for part in sorted(known)),
    ]
    text = "\n".join([*lines, f"| together | {sum(known.values()):.1f} |"])
    print(text, flush=True)
    if page is not None:
        write_section(page, "real minutes", text)


def main() -> None:
    """Judge the material that is present, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real material")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "maskattn-evidence")
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    parser.add_argument("--parts", nargs="+", default=["glass", "photographs", "glas", "slides"])
    parser.add_argument("--encoders", nargs="*", default=list(ENCODERS))
    parser.add_argument("--methods", nargs="+", help="some of them, by name")
    for name in vars(QUICK):
        parser.add_argument(f"--{name}", type=int, help="in place of the bench's own count")
    parser.add_argument("--quick", action="store_true", help="a trial on two images, which writes no page")
    arguments = parser.parse_args()
    counts = QUICK if arguments.quick else Counts()
    asked = {name: getattr(arguments, name) for name in vars(counts) if getattr(arguments, name) is not None}
    counts = replace(counts, **asked)
    names = arguments.methods or [name for name in METHODS if counts.slow or name not in SLOW]
    page = None if arguments.quick else arguments.page
    minutes, compared = {}, {}
    for part, make in _parts(arguments.real, arguments.cache, arguments.encoders, names, counts):
        if part.split(":")[0] not in arguments.parts:
            continue
        text, minutes[part], judged = make()
        if judged is not None:
            compared[
                {"photographs": "photographs, CLIP"}.get(part, f"tissue, {part.rpartition(':')[2].split()[0]}")
            ] = judged
        print(f"{part}: {minutes[part]:.1f} processor minutes\n\n{text}\n", flush=True)
        if page is not None:
            write_section(page, f"real {part}", text)
    if len(compared) == 3 and page is not None:
        write_section(page, "real notebook", beside_the_notebook(compared))
    if minutes:
        write_minutes(arguments.cache, page, minutes)


Made = tuple[str, float, Judged | None]


def _parts(
    real: Path, cache: Path, encoders: Sequence[str], names: Sequence[str], counts: Counts
) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield the parts that can be judged here, and print the reason for each one that cannot."""
    loaded = {name: (load_encoder(name, cache), ENCODERS[name]) for name in encoders if not missing(name, cache)}

    def timed(make: Callable[[], str]) -> Made:
        start = processor_seconds()
        text = make()
        return text, (processor_seconds() - start) / 60, None

    def from_rows(rows_of: Callable[..., Judged], text_of: Callable[..., str], encoder: str) -> Made:
        judged = rows_of(real, cache, encoder, loaded[encoder][0], names, counts)
        return text_of(judged, encoder, names, counts), judged.minutes, judged

    if not (real / "sections").is_dir():
        print(f"skipped: attention on glass, {real} has no sections", flush=True)
    elif loaded:
        count = 2 if counts.composites == QUICK.composites else 6
        yield "glass", partial(timed, lambda: attention_on_glass(loaded, *edge_crops(real, count)))
    for encoder in encoders:
        why = missing(encoder, cache)
        if why is not None:
            print(f"skipped: {encoder}, {why}", flush=True)
            continue
        if encoder.startswith("CLIP"):
            if (real / "photos").is_dir() and (real / "text").is_dir():
                yield "photographs", partial(from_rows, photograph_rows, of_photographs, encoder)
            else:
                print(f"skipped: photographs, {real} has no photos and text", flush=True)
        if not (real / "glas").is_dir():
            print(f"skipped: colon tissue and slides, {real} has no glas", flush=True)
            continue
        yield f"glas:{encoder}", partial(from_rows, tissue_rows, of_tissue, encoder)
        if not (real / "sections").is_dir():
            print(f"skipped: slides, {real} has no sections", flush=True)
        elif encoder.startswith("CLIP"):
            model, how = loaded[encoder]
            yield "slides", partial(timed, partial(judge_slides, real, model, how, counts.slides, cache))


if __name__ == "__main__":
    main()
