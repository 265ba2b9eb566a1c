"""Synthetic features and labels for the tests of training: slides of few tiles, whose class shows in some of them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskattn.slide.layouts import TileFeatures, write_features

WIDTH = 12


def write_slide(folder: Path, slide_id: str, features_TC: np.ndarray, **header: Any) -> Path:
    """A slide's features on a lattice, in TRIDENT's layout."""
    tiles = len(features_TC)
    side = int(np.ceil(np.sqrt(tiles)))
    coords_T2 = 256 * np.stack([np.arange(tiles) % side, np.arange(tiles) // side], axis=1)
    given = {"encoder": "uni", "spacing_um": 0.5, "token_mask": "none", **header}
    features = TileFeatures(
        slide_id=slide_id,
        patch_size_px=256,
        patch_size_lv0=256,
        width_px=256 * side,
        height_px=256 * side,
        spacing_lv0_um=given["spacing_um"],
        coords_T2=coords_T2,
        features_TC=features_TC,
        layout="trident",
        source=folder,
        **given,
    )
    return write_features("trident", folder, features)


def write_cohort(
    folder: Path, patients: int = 16, classes: int = 2, slides_each: int = 1, tiles: int = 20, seed: int = 0
) -> tuple[Path, Path]:
    """Features and labels of a cohort: ``grade`` shows in the first channel of a third of the tiles.

    Returns:
        The folder of features and the table of labels, with grade, value, months and death.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        grade = patient % classes
        for slide in range(slides_each):
            slide_id = f"s{patient:02d}{'abc'[slide]}"
            features_TC = rng.normal(size=(int(rng.integers(tiles, tiles + 6)), WIDTH)).astype(np.float32)
            features_TC[: tiles // 3, 0] += 3 * grade
            write_slide(folder / "features", slide_id, features_TC)
            months = float(np.round(rng.exponential(10.0 / (1 + 2 * grade)) + 0.1, 2))
            death = int(rng.random() < 0.7)
            if slide:
                months, death = rows[-1]["months"], rows[-1]["death"]
            rows.append(
                {
                    "slide_id": slide_id,
                    "patient_id": f"p{patient:02d}",
                    "grade": str(grade),
                    "value": 5.0 + 2.0 * grade,
                    "months": months,
                    "death": death,
                }
            )
    return folder / "features", write_table(folder / "labels.csv", rows)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
