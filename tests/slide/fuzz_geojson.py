"""Read damaged GeoJSON: each file is read or refused in a sentence, and none crashes or hangs the reader.

``python tests/slide/fuzz_geojson.py --files 10000 --seed 0`` prints counts by outcome, and ends with 1 where there was
a fault. A fault's file is printed; ``--only N`` makes that file alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1, 2)]

import numpy as np  # noqa: E402
from geojson_files import box, feature, polygon, ring  # noqa: E402

from maskattn.errors import SlideError  # noqa: E402
from maskattn.slide.grid import make_grid  # noqa: E402
from maskattn.slide.reader import SlideInfo  # noqa: E402
from maskattn.slide.tissue import TissueMask, limit_tissue, load_mask  # noqa: E402

WIDTH, HEIGHT = 1000, 700
LONGEST_S = 5.0
SENTENCE = re.compile(
    r" (must|names) .*, got .*; \w|fails with|\?$| there are |no feature of the file has a class", re.DOTALL
)
NUMBERS = (0, -1, 1e308, -1e308, 1e-308, 2**53 + 1, 10**400, float("nan"), float("inf"), 0.1 + 0.2, WIDTH, 1e5, -0.0)
THINGS = (None, True, False, "", "12", [], {}, [[]], [[[]]], "\ud800", "\0", [1], [1, 2, 3, 4], {"type": "Polygon"})
WORDS = ("Point", "Polygon", "MultiPolygon", "GeometryCollection", "Feature", "FeatureCollection", "Ignore*", "name")
BYTES = (
    b"\xff",
    b"\0",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"-",
    b"e",
    b"NaN",
    b"\xef\xbb\xbf",
    b"9" * 60,
)


def sources() -> list[Any]:
    """Valid files: holes, several areas, QuPath's and TRIDENT's variants, a map of tokens."""
    holed = polygon(box(100, 100, 300, 300), box(150, 150, 250, 250))
    several = {"type": "MultiPolygon", "coordinates": [[box(400, 100, 500, 200)], [box(600, 100, 700, 200)]]}
    collection = {"type": "GeometryCollection", "geometries": [holed, {"type": "Point", "coordinates": [1, 2]}]}
    star = polygon([[500 + 200 * np.cos(k * 2.4), 350 + 200 * np.sin(k * 2.4)] for k in range(15)])
    nested = feature(holed, "Tumor", childObjects=[feature(several, {"names": ["Tumor", "Positive"]})])
    tokens = [
        feature(polygon(box(x, 64, x + 16, 80)), "a", measurements={"relevance: a": 0.1}) for x in range(0, 160, 16)
    ]
    contour = {"type": "Feature", "properties": {"tissue_id": 0}, "geometry": polygon(ring((9, 9), (90, 9), (50, 70)))}
    return [
        {
            "type": "FeatureCollection",
            "features": [feature(holed, "Tumor"), feature(several), feature(star, "Ignore*")],
        },
        [nested, feature(collection, "Stroma")],
        {"type": "FeatureCollection", "maskattn": {"slide_id": "s"}, "features": tokens},
        {"type": "FeatureCollection", "crs": {"type": "name"}, "features": [contour]},
        star,
        feature(star),
    ]


def damaged(rng: Random) -> bytes:
    """One of the sources with one to four damages: of its values, of its structure, or of its bytes."""
    content = json.loads(json.dumps(rng.choice(sources())))
    kind = rng.random()
    if kind < 0.75:
        for _ in range(rng.randint(1, 4)):
            content = change_value(rng, content)
    data = json.dumps(content).encode()
    if kind > 0.6:
        for _ in range(rng.randint(1, 4)):
            data = change_bytes(rng, data)
    return data


def change_value(rng: Random, content: Any) -> Any:
    """The content with one of its values changed, swapped, doubled, nested or dropped."""
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            places.append((one, key))
            waiting.append(one[key])
    if not places:
        return copy.deepcopy(rng.choice(THINGS))
    holder, key = rng.choice(places)
    choice = rng.randrange(8)
    if choice == 0:
        del holder[key]
    elif choice == 1:
        holder[key] = copy.deepcopy(rng.choice(THINGS))
    elif choice == 2:
        holder[key] = rng.choice(WORDS)
    elif choice == 3:
        holder[key] = [holder[key]] * rng.choice((1, 2, 3))
    elif choice == 4:
        other, at = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[at]))
    elif choice == 5 and isinstance(holder, list):
        rng.shuffle(holder)
    elif choice == 6:
        holder[key] = rng.uniform(-WIDTH, 2 * WIDTH)
    else:
        holder[key] = rng.choice(NUMBERS)
    return content


def change_bytes(rng: Random, data: bytes) -> bytes:
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    choice = rng.randrange(6)
    if choice == 0:
        return data[:at]
    if choice == 1:
        return data[:at] + data[min(end, at + rng.randint(1, 20)) :]
    if choice == 2:
        return data[:at] + data[at : at + 40] + data[at:]
    if choice == 3:
        return data[:at] + rng.choice((b"[", b'{"a":')) * rng.choice((10, 5000)) + data[at:]
    if choice == 4 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return data[:at] + rng.choice(BYTES) + data[at:]


def examine(data: bytes, folder: Path) -> tuple[str, str]:
    """(outcome, detail) of one file: as a mask, as a region of interest, and the grid on each."""
    path = folder / "fuzzed.geojson"
    path.write_bytes(data)
    info = SlideInfo(path, WIDTH, HEIGHT, ((WIDTH, HEIGHT),), ((1.0, 1.0),), 1.0, "metadata", None, None, {})
    everywhere = TissueMask(np.ones((70, 100), bool), 10.0, (10.0, 10.0), "file", 1.0)
    start, outcomes, detail = time.perf_counter(), [], ""
    for read in (
        lambda: load_mask(path, info),
        lambda: load_mask(path, info, tissue_classes=["Tumor"]),
        lambda: limit_tissue(everywhere, info, "s", (path, None)),
    ):
        try:
            tissue = read()
            grid = make_grid(info, tissue, tile_px=64, token_px=16, spacing_um=1.0)
            if not 0 <= tissue.tissue_fraction <= 1 or (not grid.kept_tiles and tissue.tissue_fraction > 0.01):
                return "wrong result", f"{tissue.tissue_fraction} of the slide, {grid.kept_tiles} tiles"
            outcomes.append("read")
        except SlideError as error:
            outcomes.append("refused")
            detail = str(error)
            if not SENTENCE.search(detail) or "\n" in detail:
                return "unclear message", detail
        except Exception as error:
            return "exception", f"{type(error).__name__}: {error}"
    return ("hang" if time.perf_counter() - start > LONGEST_S else outcomes[0]), detail


def fuzz(numbers: range, seed: int) -> tuple[Counter[str], list[str]]:
    """Counts by outcome, and the faults."""
    counts: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            data = damaged(Random(f"{seed}/{number}"))
            outcome, detail = examine(data, Path(folder))
            counts[outcome] += 1
            if outcome not in ("read", "refused"):
                faults.append(f"{number}: {outcome}: {detail}\n{data[:2000]!r}")
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    numbers = range(given.files) if given.only is None else range(given.only, given.only + 1)
    counts, faults = fuzz(numbers, given.seed)
    print("\n".join(faults))
    print(", ".join(f"{outcome}: {count}" for outcome, count in sorted(counts.items())))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
