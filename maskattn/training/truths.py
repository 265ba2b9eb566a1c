"""The meaning of a label's cells for a task: a class, a value, or a time and an event."""

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
    """Return the classes of a task in order: as given in the settings, or by number, or by name.

    Args:
        task: binary, multiclass or ordinal.
        cells: the label of each slide.
        settings: the settings, with the classes if they are given.
        source: the table, for messages.

    Raises:
        ValueError: there is only one class, a binary task has more than two, ordinal classes have no order, or a label
            is not one of the given classes.
    """
    counts = Counter(cells)
    where = f"in the column {settings.target!r} of {as_text(source)}"
    if settings.classes is not None:
        classes = settings.classes
        if len(set(classes)) != len(classes):
            raise ValueError(f"classes must have different names, got {', '.join(classes)}")
        if unknown := [name for name in counts if name not in classes]:
            raise ValueError(
                f"labels must be of the classes {', '.join(classes)}, got {some_of(unknown)} {where}; name every class "
                "with --class, or correct the labels"
            )
        if empty := [name for name in classes if name not in counts]:
            raise ValueError(f"every class must have a slide, got none of {some_of(empty)} {where}; leave it out")
    else:
        classes = _sorted(task, list(counts), where)
    if len(classes) < 2 or (task == "binary" and len(classes) != 2):
        rule = "exactly two classes" if task == "binary" else "two classes or more"
        counted = ", ".join(f"{name} ({counts[name]} slides)" for name in classes[:6])
        remedy = "take --task multiclass or ordinal" if len(classes) > 2 else "add slides of another class"
        raise ValueError(f"a {task} task must have {rule}, got {counted} {where}; {remedy}")
    if len(classes) > _MOST_CLASSES:
        raise ValueError(
            f"a {task} task may have up to {_MOST_CLASSES} classes, got {len(classes)} {where}; take --task regression "
            "if they are numbers"
        )
    return classes


def _sorted(task: Task, names: list[str], where: str) -> tuple[str, ...]:
    numbers = {name: _number(name) for name in names}
    if all(math.isfinite(number) for number in numbers.values()):
        return tuple(sorted(names, key=numbers.__getitem__))
    if task == "ordinal":
        raise ValueError(
            f"ordinal classes that are not numbers must be given in order, got {some_of(sorted(names))} {where}; name "
            "them from the lowest to the highest, --class LOWEST --class NEXT ..."
        )
    return tuple(sorted(names))


def read_truth(task: Task, cells: Sequence[str], classes: Sequence[str], slide_id: str) -> tuple[float, ...]:
    """Return the meaning of a slide's cells: (class index,), (value,), or (time, event).

    Raises:
        ValueError: a cell is not a number, a time is negative, or an event is neither 1 nor 0.
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
    event = cells[1].casefold()
    if event not in (*_YES, *_NO):
        raise ValueError(f"an event must be 1 (observed) or 0 (censored), got {cells[1]!r} for {slide_id!r}")
    return (number, float(event in _YES))


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ".") if text.count(",") == 1 else text)
    except ValueError:
        return math.nan
