"""Files of splits: the layouts of other tools, and that of ``crossval``.

========== ==================================================================== =====================================
tool       files                                                                columns
========== ==================================================================== =====================================
CLAM       ``splits_0.csv``, ``splits_1.csv``, ... in a folder, or one of them  ``train``, ``val``, ``test``: ids below
CLAM       ``splits_0_bool.csv``, ... if the former do not exist                the id, then True in one of the three
soma       one table                                                            ``fold``, ``sample_id``, ``split``
HIPT       ``fold_0/train.csv``, ``tune.csv``, ``test.csv``, ...                the id in the first column
ours       ``splits.csv``                                                       ``fold``, ``patient_id``, ``split``
========== ==================================================================== =====================================

Ids are those of slides or of patients. The part that chooses the epoch is called val, valid, validation, tune or dev.

Source: CLAM's ``dataset_modules/dataset_generic.py``, soma's ``docs/dataset.rst`` and hipt's training scripts.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from maskattn.errors import OutputError
from maskattn.evaluation.prediction_file import read_rows
from maskattn.evaluation.predictions import some_of
from maskattn.evaluation.splits import Split
from maskattn.files import replacing

__all__ = ["read_splits", "write_splits"]

_PARTS = dict.fromkeys(("val", "valid", "validation", "tune", "dev"), "validation") | {"train": "train"}
_TRUE = frozenset(("true", "1", "1.0"))
_IDS = ("patient_id", "PATIENT", "case_id", "sample_id", "slide_id")
Parts = dict[str, list[str]]


def read_splits(path: Path, patient_of: Mapping[str, str]) -> list[Split]:
    """Read the folds of a table or a folder, in any of these layouts.

    Args:
        path: a file or a folder.
        patient_of: slide or patient → patient, for every slide and patient with a label.

    Returns:
        A split of patients for each fold.

    Raises:
        LeakError: a patient is in two parts of a fold, possibly by two slides.
        ValueError: the layout is none of these, an id has no label, or a part is empty.
    """
    folds = _read_folder(path) if path.is_dir() else _read_file(path)
    splits = []
    for fold, parts in enumerate(folds):
        unknown = [name for part in parts.values() for name in part if name not in patient_of]
        if unknown:
            raise ValueError(
                f"every id of a split must be a slide or a patient of the labels, got {some_of(unknown)} "
                f"({len(unknown)} in fold {fold} of {path}); add their labels, or remove them from the split"
            )
        of = {name: tuple(dict.fromkeys(patient_of[one] for one in part)) for name, part in parts.items()}
        try:
            splits.append(Split(of.get("train", ()), of.get("validation", ()), of.get("test", ())))
        except ValueError as error:
            raise type(error)(f"{error} (fold {fold} of {path})") from error
    return splits


def write_splits(splits: Sequence[Split], path: Path) -> None:
    """Write the folds as one table with the columns ``fold``, ``patient_id``, ``split`` and soma's names of the parts.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["fold", "patient_id", "split"])
            for fold, split in enumerate(splits):
                for name, part in (("train", split.train), ("tune", split.validation), ("test", split.test)):
                    table.writerows([fold, patient, name] for patient in part)
    except OSError as error:
        raise OutputError(f"the splits must be written completely, got {path}: {error.strerror or error}") from error


def _read_folder(path: Path) -> list[Parts]:
    wide = _numbered(path.glob("splits_*.csv"), r"splits_(\d+)\.csv")
    wide = wide or _numbered(path.glob("splits_*_bool.csv"), r"splits_(\d+)_bool\.csv")
    if wide:
        return [_clam(file) for file in wide]
    folders = _numbered(path.glob("fold_*"), r"fold_(\d+)")
    if folders:
        return [_hipt(folder) for folder in folders]
    if (path / "splits.csv").is_file():
        return _read_file(path / "splits.csv")
    raise ValueError(
        f"a folder of splits must have splits_0.csv, fold_0/train.csv or splits.csv, got none in {path}; name the file"
    )


def _numbered(paths: Iterable[Path], pattern: str) -> list[Path]:
    found = {int(match[1]): path for path in paths if (match := re.fullmatch(pattern, path.name))}
    return [found[number] for number in sorted(found)]


def _read_file(path: Path) -> list[Parts]:
    header, rows = read_rows(path)
    if "split" not in header:
        return [_clam(path)]
    column = next((name for name in _IDS if name in header), None)
    if column is None:
        raise ValueError(
            f"a table of splits must have the columns fold, sample_id, split, got {some_of(header, 12)} in {path}"
        )
    folds: dict[str, Parts] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        folds[row.get("fold", "")][_part_of(row["split"], path)].append(row[column])
    for fold, parts in folds.items():
        tests = sorted(name for name in parts if name.startswith("test"))
        if len(tests) > 1:
            raise ValueError(
                f"a fold must have one test part, got {', '.join(tests)} in fold {fold or 0} of {path}; keep one, and "
                "predict the others with the models"
            )
        if tests:
            parts["test"] = parts.pop(tests[0])
    return [folds[fold] for fold in sorted(folds, key=lambda name: (len(name), name))]


def _part_of(name: str, path: Path) -> str:
    plain = name.casefold()
    if plain in _PARTS:
        return _PARTS[plain]
    if plain.startswith("test"):
        return plain
    raise ValueError(f"a split must be train, tune (or val) or test, got {name!r} in {path}; rename it")


def _clam(path: Path) -> Parts:
    header, rows = read_rows(path)
    if not {"train", "val", "test"} <= set(header):
        raise ValueError(
            "a table of splits must have the columns train, val, test (CLAM's) or fold, sample_id, split (soma's), got "
            f"{some_of(header, 12)} in {path}"
        )
    names = {"train": "train", "val": "validation", "test": "test"}
    values = {row[name].casefold() for row in rows for name in names}
    if values <= _TRUE | {"false", "0", "0.0"}:
        identifier = header[0]  # pandas writes the index without a name
        return {
            part: [row[identifier] for row in rows if row[name].casefold() in _TRUE] for name, part in names.items()
        }
    return {part: [row[name] for row in rows if row[name]] for name, part in names.items()}


def _hipt(folder: Path) -> Parts:
    parts = {}
    for name, part in (("train", "train"), ("tune", "validation"), ("test", "test")):
        path = folder / f"{name}.csv"
        if part == "test" and not path.is_file():
            continue
        header, rows = read_rows(path)
        column = next((known for known in _IDS if known in header), header[0])
        parts[part] = [row[column] for row in rows]
    return parts
