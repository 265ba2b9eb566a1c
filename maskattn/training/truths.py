"""What a cell of the labels means for a task: a class, a value, or a time and whether the event was seen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maskattn.evaluation.predictions import Task, some_of
from maskattn.slide.names import as_text
from maskattn.training.settings import TrainSettings

__all__ = ["classes_of", "read_truth"]

_YES = ("1", "1.0", "true", "yes", "dead", "deceased", "event")
_NO = ("0", "0.0", "false", "no", "alive", "living", "censored")
_MOST_CLASSES = 50


def classes_of(task: Task, cells: Sequence[str], settings: TrainSettings, source: Path) -> tuple[str, ...]:
    """The classes of a task, in their order: as they are given, or by number, or by name.

    Raises:
        ValueError: there is one class only, more than two of a binary task, no order of ordinal classes, or a label
            that is none of the classes that are given.
    """
    counts = Counter(cells)
    where = f"in the column {settings.target!r} of {as_text(source)}"
    if settings.classes is not None:
        classes = settings.classes
        if len(set(classes)) != len(classes):
            raise ValueError(f"classes must have different names, got {', '.join(classes)}")
        if strange := [name for name in counts if name not in classes]:
            raise ValueError(
                f"labels must be of the classes {', '.join(classes)}, got {some_of(strange)} {where}; name every class "
                "with --class, or correct the labels"
            )
        if empty := [name for name in classes if name not in counts]:
            raise ValueError(f"every class must have a slide, got none of {some_of(empty)} {where}; leave it out")
    else:
        classes = _sorted(task, list(counts), where)
    if len(classes) < 2 or (task == "binary" and len(classes) != 2):
        rule = "exactly two classes" if task == "binary" else "two classes or more"
        told = ", ".join(f"{name} ({counts[name]} slides)" for name in classes[:6])
        remedy = "take --task multiclass or ordinal" if len(classes) > 2 else "add slides of another class"
        raise ValueError(f"a {task} task must have {rule}, got {told} {where}; {remedy}")
    if len(classes) > _MOST_CLASSES:
        raise ValueError(
            f"a {task} task may have up to {_MOST_CLASSES} classes, got {len(classes)} {where}; take --task regression "
            "where they are numbers"
        )
    return classes


def _sorted(task: Task, names: list[str], where: str) -> tuple[str, ...]:
    numbers = {name: _number(name) for name in names}
    if all(math.isfinite(number) for number in numbers.values()):
        return tuple(sorted(names, key=numbers.__getitem__))
    if task == "ordinal":
        raise ValueError(
            f"ordinal classes that are no numbers must be given in their order, got {some_of(sorted(names))} {where}; "
            "name them from the lowest on, --class LOWEST --class NEXT ..."
        )
    return tuple(sorted(names))


def read_truth(task: Task, cells: Sequence[str], classes: Sequence[str], slide_id: str) -> tuple[float, ...]:
    """What the cells of a slide's row mean: (class index,), (value,), or (time, event).

    Raises:
        ValueError: a cell is no number, a time is negative, or an event is neither 1 nor 0.
    """
    if task in ("binary", "multiclass", "ordinal"):
        return (float(classes.index(cells[0])),)
    number = _number(cells[0])
    if task == "regression":
        if not math.isfinite(number):
            raise ValueError(f"labels of a regression must be finite numbers, got {cells[0]!r} for {slide_id!r}")
        return (number,)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"a time to an event must be a number of 0 or more, got {cells[0]!r} for {slide_id!r}")
    said = cells[1].casefold()
    if said not in (*_YES, *_NO):
        raise ValueError(f"an event must be 1 (seen) or 0 (censored), got {cells[1]!r} for {slide_id!r}")
    return (number, float(said in _YES))


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ".") if text.count(",") == 1 else text)
    except ValueError:
        return math.nan
