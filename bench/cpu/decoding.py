"""Tiles of a slide decoded by OpenSlide alone, and as the package decodes them.

    python -m bench.cpu.decoding SLIDE.svs [SLIDE ...]

Every tile of level 0 is read in rows, tiles of 224 and of 512 px, and then the whole level at once (up to 3,000 px a
side), as the search for tissue reads a slide that has one level. The readers take turns and open
the file in every round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench.timing import median_ratio, rounds_of
from maskattn.slide.formats.image import SlideImage
from maskattn.slide.formats.opening import open_image
from maskattn.slide.formats.openslide_image import OpenSlideImage

SIDES_PX = (224, 512, 3000)


def rectangles(size: tuple[int, int], side: int) -> list[tuple[int, int, int, int]]:
    """Return the (x, y, width, height) of the squares that cover a level; those at the edges are cut."""
    width, height = size
    return [
        (x, y, min(side, width - x), min(side, height - y))
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


def read_all(opened: Callable[[Path], SlideImage], path: Path, side: int) -> int:
    """Read level 0 of a slide tile by tile; return the number of tiles."""
    image = opened(path)
    tiles = rectangles(image.level_dimensions[0], side)
    for tile in tiles:
        image.read(0, *tile)
    image.close()
    return len(tiles)


def equal(path: Path, side: int) -> bool:
    """Return whether both readers give the same pixels."""
    ours, theirs = open_image(path), OpenSlideImage(path)
    tiles = rectangles(theirs.level_dimensions[0], side)
    same = all(np.array_equal(ours.read(0, *tile)[..., :3], theirs.read(0, *tile)[..., :3]) for tile in tiles)
    ours.close()
    theirs.close()
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| slide | side, px | tiles | OpenSlide, ms a tile | ours | times as fast | same pixels |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for path in arguments.slides:
        for side in SIDES_PX:
            makers = {"theirs": OpenSlideImage, "ours": open_image}
            readers = {name: partial(read_all, opened, path, side) for name, opened in makers.items()}
            tiles = readers["ours"]()
            seconds = rounds_of(readers, arguments.rounds)
            theirs, ours = (1e3 * float(np.median(seconds[name])) / tiles for name in readers)
            ratio, same = median_ratio(seconds["theirs"], seconds["ours"]), "yes" if equal(path, side) else "no"
            cells = path.name, side, tiles, f"{theirs:.2f}", f"{ours:.2f}", f"{ratio:.2f}", same
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
