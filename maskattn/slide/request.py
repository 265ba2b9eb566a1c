"""What a run is asked for: one dataclass, which says of each field how the other rooms treat it.

The command line has an option for every field, ``prediction.json`` records the fields, and a run that finds a finished
slide compares them. All three read the :class:`Asked` of a field, so that a new field is written here and nowhere else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskattn.errors import ManifestError
from maskattn.explain.methods import DEFAULT_METHOD, METHODS, method_named

if TYPE_CHECKING:
    from maskattn.slide.manifest import SlideJob
    from maskattn.slide.prediction import SlidePrediction

__all__ = ["Asked", "RunSettings", "asked_of", "check_request", "differences", "finds_tissue", "recorded"]


@dataclass(frozen=True)
class Asked:
    """How a field of the request is given, recorded and compared.

    Attributes:
        flag: its option on the command line; of a bool, the option that reverses its default.
        help: what the option does, in a sentence.
        minimum: least number that is taken; None where any is.
        maximum: greatest number that is taken.
        default: the command line's default; ``...`` where it is the field's own.
        recorded: whether ``prediction.json`` has it among its settings.
        before: what an earlier version did, whose ``prediction.json`` does not say; ``...`` where it is the default.
        serves: (found, asked) → whether a slide that was run with one value is what the other asks for; None where the
            field does not change what is found.
    """

    flag: str
    help: str
    minimum: int | None = None
    maximum: int | None = None
    default: Any = ...
    recorded: bool = True
    before: Any = ...
    serves: Callable[[Any, Any], bool] | None = operator.eq


def _asked(flag: str, help: str, **more: Any) -> dict[str, Asked]:
    return {"asked": Asked(flag, help, **more)}


@dataclass(frozen=True)
class RunSettings:
    """How slides are run.

    Attributes:
        out_dir: each slide's outputs go to ``out_dir/<slide_id>/``.
        masked: False attends to glass too, for comparison.
        mask_values: the labels of a user's mask that mean tissue; None = any but 0.
        tokens: also make relevance maps at the resolution of tokens, in a second pass over the slide.
        method: of explanation; see :data:`maskattn.explain.METHODS`.
        check: test each map by dropping the tiles that it calls most relevant.
        ink: "auto" takes pen strokes out of the tissue that is found, "off" keeps them.
        force: run slides that were not scanned in bright field too.
        spacing_um: µm per level-0 pixel of every slide, in place of what manifest and files say.
        series: which series of files that hold several; None = the largest.
        batch_size: tiles encoded at a time; bounds the memory.
        workers: processes that decode tiles; 0 = decode in this one; None = some, where a slide is large enough.
        overwrite: run finished slides again.
    """

    out_dir: Path = field(
        metadata=_asked("--out", "Folder of outputs; made if it is not there.", recorded=False, serves=None)
    )
    _: KW_ONLY
    masked: bool = field(default=True, metadata=_asked("--no-mask", "Attend to glass too, for comparison."))
    mask_values: tuple[int, ...] | None = field(
        default=None, metadata=_asked("--mask-value", "A label of the mask that means tissue (may be repeated).")
    )
    tokens: bool = field(
        default=False,
        # A slide that was run with tokens has all that one without them has.
        metadata=_asked("--tokens", "Relevance of tokens too; reads each slide twice.", serves=operator.ge),
    )
    method: str = field(
        default=DEFAULT_METHOD,
        metadata=_asked(
            "--method",
            f"Of explanation: {', '.join(name for name, method in METHODS.items() if method.levels)}.",
            before="cdam",
        ),
    )
    check: bool = field(
        default=True,
        # A slide whose maps were tested has all that one without the test has.
        metadata=_asked(
            "--no-check", "Do not test the maps by dropping what they call relevant.", before=False, serves=operator.ge
        ),
    )
    ink: Literal["auto", "off"] = field(
        default="auto", metadata=_asked("--ink", "auto leaves pen strokes out of the tissue, off keeps them.")
    )
    force: bool = field(
        default=False,
        # A slide that passed without force passes with it too.
        metadata=_asked("--force", "Go on where a slide was not scanned in bright field.", serves=operator.le),
    )
    spacing_um: float | None = field(
        default=None,
        # Recorded and compared with the slide, whose spacing it becomes.
        metadata=_asked(
            "--spacing-um", "µm per level-0 pixel, in place of what the slide says.", recorded=False, serves=None
        ),
    )
    series: int | None = field(
        default=None,
        metadata=_asked(
            "--series", "Series of a TIFF that holds several (see info); by default the largest.", minimum=0
        ),
    )
    batch_size: int = field(
        default=32,
        metadata=_asked("--batch-size", "Tiles at a time; bounds the memory.", minimum=1, maximum=65536, serves=None),
    )
    workers: int | None = field(
        default=0,  # a script that starts processes must guard its entry, so that in Python they are asked for
        metadata=_asked(
            "--workers",
            "Processes that decode tiles; by default some for large slides.",
            minimum=0,
            maximum=512,
            default=None,
            serves=None,
        ),
    )
    overwrite: bool = field(
        default=False, metadata=_asked("--overwrite", "Run finished slides again.", recorded=False, serves=None)
    )


def asked_of(field: Field[Any]) -> Asked:
    """What a field of :class:`RunSettings` says of itself."""
    asked: Asked = field.metadata["asked"]
    return asked


def check_request(jobs: Sequence[SlideJob], settings: RunSettings, model_masked: bool = True) -> None:
    """Refuse masks that nobody would look at, labels of masks that nobody gave, and ink where no tissue is sought.

    Args:
        jobs: the slides.
        settings: how they are to be run.
        model_masked: whether the model leaves background out; True where that is not known yet.

    Raises:
        ManifestError: some of what was asked for would have no effect.
        ValueError: there is no such method of explanation for slide models.
    """
    method_named(settings.method, levels=True)
    given = [job for job in jobs if job.mask_path is not None]
    if given and not (settings.masked and model_masked):
        who = (
            "this model attends to all of a slide, masks or not"
            if settings.masked
            else "--no-mask attends to glass too"
        )
        raise ManifestError(
            f"{who}, so a mask would have no effect, got {given[0].mask_path} for {given[0].slide_id!r}"
            + (f" and {len(given) - 1} more" if len(given) > 1 else "")
            + "; leave out --mask and the manifest's mask_path"
            + ("" if settings.masked else ", or --no-mask")
        )
    if settings.mask_values is not None and not given:
        raise ManifestError(
            f"--mask-value names labels of a mask, got {', '.join(map(str, settings.mask_values))} and no mask; "
            "give one with --mask or the manifest's mask_path, or leave the values out"
        )
    if settings.ink == "off" and not any(finds_tissue(job, settings, model_masked) for job in jobs):
        why = "every slide has a mask" if settings.masked and model_masked else "glass is attended to too"
        raise ManifestError(
            f"--ink says how tissue is found, got --ink off where none is sought: {why}; leave --ink out"
        )


def finds_tissue(job: SlideJob, settings: RunSettings, model_masked: bool) -> bool:
    """Whether the slide's tissue is sought: not where it is given, nor where glass is attended to too."""
    return settings.masked and model_masked and job.mask_path is None


def recorded(job: SlideJob, settings: RunSettings, model_masked: bool) -> dict[str, Any]:
    """The request for a slide as ``prediction.json`` has it: as it was carried out, a mask only where it is looked at.

    Args:
        job: the slide.
        settings: how it is run.
        model_masked: whether the model leaves background out.
    """
    masked = settings.masked and model_masked
    mask_path = job.mask_path if masked else None
    values = settings.mask_values if mask_path is not None else None
    record = {one.name: getattr(settings, one.name) for one in fields(settings) if asked_of(one).recorded}
    # Rebuilt so that the mask stands after what it depends on.
    carried_out = {"masked": masked, "mask": None if mask_path is None else mask_path.name}
    return {**carried_out, **record, "masked": masked, "mask_values": None if values is None else list(values)}


def differences(
    finished: SlidePrediction, job: SlideJob, settings: RunSettings, model_masked: bool
) -> Iterator[tuple[str, Any, Any]]:
    """Where a finished slide was run otherwise than is asked for: (name, what was found, what is asked for).

    What an earlier version did not record was not asked for then, and has its default, or what was done before.

    Args:
        finished: the prediction of the earlier run.
        job: the slide.
        settings: how it is to be run now.
        model_masked: whether the model leaves background out.
    """
    before = {
        one.name: one.default if asked_of(one).before is ... else asked_of(one).before for one in fields(settings)
    }
    serves = {one.name: asked_of(one).serves for one in fields(settings)} | {"mask": operator.eq}
    for name, asked in recorded(job, settings, model_masked).items():
        found, does_serve = finished.settings.get(name, before.get(name)), serves[name]
        if name == "ink" and not finds_tissue(job, settings, model_masked):
            continue
        if does_serve is not None and not does_serve(found, asked):
            yield name, found, asked
