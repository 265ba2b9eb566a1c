"""Parse and check a run's options for outlines and regions of high relevance, before any slide is read.

Nothing here imports slow packages, because the command line imports these rules at its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskattn.errors import ManifestError
from maskattn.slide.file_checks import is_folder, problem_of_file
from maskattn.slide.names import shortened
from maskattn.slide.outlines.names import nearest

if TYPE_CHECKING:
    import numpy as np

    from maskattn.shapes import Float
    from maskattn.slide.extract_request import ExtractSettings
    from maskattn.slide.request import RunSettings

__all__ = ["RegionRule", "check_areas", "check_classes_of", "check_outlines", "check_region_classes", "parse_regions"]


@dataclass(frozen=True)
class RegionRule:
    """The threshold of relevance above which tiles or tokens belong to a region of a class.

    Attributes:
        class_name: a class of the slide model.
        value: the least relevance, or a percentile of the relevance of all tiles or tokens, 0 to 100.
        is_percentile: whether ``value`` is a percentile.
    """

    class_name: str
    value: float
    is_percentile: bool

    def threshold(self, relevance_N: Float[np.ndarray, " N"]) -> float:
        """Return the least relevance of a region's tiles or tokens; a percentile gives no threshold below 0.

        Args:
            relevance_N: (N,) relevance of all tiles or tokens for the class.
        """
        import numpy as np

        if not self.is_percentile:
            return self.value
        return max(0.0, float(np.percentile(relevance_N, self.value))) if len(relevance_N) else 0.0


def parse_regions(texts: Sequence[str]) -> tuple[RegionRule, ...]:
    """Parse the values of ``--region``, each ``CLASS=VALUE`` or ``CLASS=PERCENT%``.

    Raises:
        ManifestError: a value is not a rule, or a class has two rules.
    """
    rules = []
    for text in texts:
        class_name, found, value = text.rpartition("=")
        percent = value.strip().endswith("%")
        try:
            number = float(value.strip().removesuffix("%"))
        except ValueError:
            number = math.nan
        if not (found and class_name) or not math.isfinite(number) or (percent and not 0 <= number <= 100):
            raise ManifestError(
                f"--region must be CLASS=VALUE or CLASS=PERCENT%, got {text!r}; write for example tumour=95% for the "
                "places whose relevance is among the highest 5 %"
            )
        rules.append(RegionRule(class_name, number, percent))
    names = [rule.class_name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise ManifestError(f"--region may name a class once, got {names.count(name)} for {name!r}; leave one")
    return tuple(rules)


def check_region_classes(texts: Sequence[str] | None, classes: Sequence[str]) -> None:
    """Check that every class named by ``--region`` is a class of the model.

    Raises:
        ManifestError: the model lacks a class.
    """
    for rule in parse_regions(texts or ()):
        if rule.class_name not in classes:
            raise ManifestError(
                f"--region must name a class of the model, got {rule.class_name!r}; {nearest(rule.class_name, classes)}"
            )


def check_classes_of(flag: str, classes: Sequence[str] | None, *, with_file: bool) -> None:
    """Check that classes of outlines are named only if outlines are given.

    Args:
        flag: the option that names the classes: the outlines' own option followed by "-class".
        classes: the names of the classes; None if there are none.
        with_file: whether outlines are given.

    Raises:
        ManifestError: classes are named without outlines.
    """
    if classes and not with_file:
        raise ManifestError(
            f"{flag} names classes of outlines, got {', '.join(map(repr, classes))} and no outlines; give them with "
            f"{flag.removesuffix('-class')}, or leave the classes out"
        )


def check_areas(settings: RunSettings | ExtractSettings, *, with_mask: bool, without_effect: str | None) -> None:
    """Check that the requested areas would have an effect, and that their files can be read.

    Args:
        settings: the settings of the run.
        with_mask: whether any slide has a mask of its own.
        without_effect: why areas would have no effect, with the remedy; None if they have one.

    Raises:
        ManifestError: an option would have no effect, or a file cannot be read.
    """
    check_classes_of("--mask-class", settings.mask_classes, with_file=with_mask)
    check_classes_of("--roi-class", settings.roi_classes, with_file=settings.roi is not None)
    check_classes_of("--exclude-class", settings.exclude_classes, with_file=settings.exclude is not None)
    for flag, path in (("--roi", settings.roi), ("--exclude", settings.exclude)):
        if path is not None and without_effect is not None:
            raise ManifestError(f"{flag} says what of the tissue takes part, got {shortened(path)} {without_effect}")
        problem = None if path is None or is_folder(path) else problem_of_file(path, f"file of {flag}")
        if problem is not None:
            raise ManifestError(problem)


def check_outlines(settings: RunSettings) -> None:
    """Check that ``--geojson tokens`` comes with ``--tokens``, and ``--region`` with ``--geojson``.

    Raises:
        ManifestError: an option lacks the one that it needs.
    """
    if settings.geojson == "tokens" and not settings.tokens:
        raise ManifestError(
            "--geojson tokens needs the relevance of tokens, got no --tokens; give it, or write --geojson tiles"
        )
    regions = parse_regions(settings.regions or ())
    if regions and settings.geojson == "off":
        raise ManifestError(
            f"--region adds annotations to relevance.geojson, got {regions[0].class_name!r} and no such file; "
            "give --geojson tiles or tokens, or leave --region out"
        )
