"""Recognise, find, read and check feature files and files of coordinates of any supported tool."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from maskattn.errors import SlideError
from maskattn.slide.layouts.atlaspatch import AtlasPatch
from maskattn.slide.layouts.checks import check_inside, check_same_slide
from maskattn.slide.layouts.clam import Clam
from maskattn.slide.layouts.contents import FileContents, look_into
from maskattn.slide.layouts.layout import FeatureLayout, FeatureReader
from maskattn.slide.layouts.slide2vec import Slide2Vec
from maskattn.slide.layouts.stamp import Stamp
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures
from maskattn.slide.layouts.trident import Trident
from maskattn.slide.names import as_text, shortened

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = [
    "FEATURE_LAYOUTS",
    "FEATURE_READERS",
    "detect_layout",
    "find_coords",
    "find_features",
    "list_features",
    "read_coords",
    "read_features",
    "write_features",
]

FEATURE_LAYOUTS: dict[str, FeatureLayout] = {
    layout.name: layout for layout in (Trident(), Clam(), Stamp(), Slide2Vec())
}
"""The layouts that can be written, by name; all of them can be read too."""

FEATURE_READERS: tuple[FeatureReader, ...] = (*FEATURE_LAYOUTS.values(), AtlasPatch())
"""All layouts that can be read."""

_ROWS_AT_ONCE = 4096
# Folders in which layouts keep nothing but features.
_FEATURES_ALONE = re.compile(r"(?:^|/)(?:(?:patch_)?features_\*|h5_files|pt_files|tile_embeddings)/")
_TilesT = TypeVar("_TilesT", bound=TileCoords)


def detect_layout(path: str | Path) -> FeatureReader:
    """Return the layout of a file of features or coordinates.

    Raises:
        SlideError: the file cannot be read, or has no known layout.
    """
    contents = look_into(Path(path))
    for reader in FEATURE_READERS:
        if reader.has_features(contents) or reader.has_coords(contents):
            return reader
    raise _unknown(contents)


def read_features(
    path: str | Path, *, slide: SlideInfo | None = None, encoder: str | None = None, named: Sequence[str] = ()
) -> TileFeatures:
    """Read tile features in any known layout.

    Args:
        path: the feature file.
        slide: the slide of the features; it completes the file's metadata, and must agree with them.
        encoder: the name of the encoder, if the file has features of several.
        named: accepted names of the slide (its id, its file's name); a file that states another is refused.

    Raises:
        SlideError: the file cannot be read, has no known layout, belongs to another slide, lacks one finite row of
            features per tile, or has coordinates outside the slide.
    """
    path = Path(path)
    contents = look_into(path)
    reader = next((reader for reader in FEATURE_READERS if reader.has_features(contents)), None)
    if reader is None:
        raise _unknown(contents)
    return _checked(reader.read_features(path, slide, encoder), slide, named)


def read_coords(path: str | Path, *, slide: SlideInfo | None = None, named: Sequence[str] = ()) -> TileCoords:
    """Read the positions of a slide's tiles from a feature file, or a file of coordinates in any known layout.

    Args:
        path: the file.
        slide: the slide, as for :func:`read_features`.
        named: accepted names of the slide, as for :func:`read_features`.

    Raises:
        SlideError: the file cannot be read, has no known layout, belongs to another slide, or has coordinates outside
            the slide.
    """
    return _checked(detect_layout(path).read_coords(Path(path), slide), slide, named)


def find_features(root: str | Path, slide_id: str) -> Path | None:
    """Find the feature file of a slide below a folder; None if there is none.

    Raises:
        SlideError: there are several.
    """
    return _find(Path(root), slide_id, features=True)


def find_coords(root: str | Path, slide_id: str) -> Path | None:
    """Find a slide's file of coordinates below a folder, else its feature file, which has coordinates too.

    Raises:
        SlideError: there are several.
    """
    return _find(Path(root), slide_id, features=False) or _find(Path(root), slide_id, features=True)


def list_features(root: str | Path) -> dict[str, Path]:
    """List the feature files below a folder by the slides' ids, which are taken from the files' names.

    Unreadable files are listed, as is every file in a folder where a layout keeps nothing but features: the error
    comes when that file is read, and does not stop the other slides.

    Raises:
        SlideError: the folder does not exist, has no feature files, or has several of one slide.
    """
    root = Path(root)
    if not root.is_dir():
        raise SlideError(f"features must be in a folder, got no folder {as_text(root)}; check its name")
    ids: set[str] = set()
    for reader in FEATURE_READERS:
        for pattern in reader.feature_patterns:
            for path in root.glob(pattern.format(id="*")):
                ids.add(path.parent.name if pattern.startswith("{id}/") else path.stem)
    seen: dict[Path, FileContents | None] = {}
    found = {slide_id: _find(root, slide_id, features=True, seen=seen) for slide_id in sorted(ids)}
    files = {slide_id: path for slide_id, path in found.items() if path is not None}
    if not files:
        raise SlideError(
            f"a folder of features must hold files that TRIDENT, CLAM, STAMP, slide2vec or AtlasPatch wrote, got none "
            f"in {as_text(root)}; name the folder that holds them, or the one above"
        )
    return files


def write_features(layout: str, root: str | Path, features: TileFeatures) -> Path:
    """Write a slide's features from memory in a layout.

    Args:
        layout: the name of the layout, a key of :data:`FEATURE_LAYOUTS`.
        root: the folder below which the layout's folders are made.
        features: the features with their coordinates and metadata.

    Returns:
        The path of the feature file, the last file to appear.

    Raises:
        ValueError: the layout is unknown, or ``features`` lacks metadata that it requires.
        OSError: a file cannot be written.
    """
    if layout not in FEATURE_LAYOUTS:
        raise ValueError(f"a layout must be one of {', '.join(FEATURE_LAYOUTS)}, got {layout!r}; choose one of them")
    chosen, root = FEATURE_LAYOUTS[layout], Path(root)
    features_TC, coords_T2 = features.features_TC, features.coords_T2
    with chosen.writing(root, features, features_TC.shape[1], features_TC.dtype) as take:
        for first in range(0, len(coords_T2), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            take(features_TC[rows], coords_T2[rows], None)
    return chosen.path_of(root, features)


def _checked(tiles: _TilesT, slide: SlideInfo | None, named: Sequence[str]) -> _TilesT:
    size = None if slide is None else (slide.width_px, slide.height_px)
    check_same_slide(tiles, tuple(named), size)
    if slide is not None:
        spacing_um = tiles.spacing_um
        if spacing_um is None and tiles.patch_size_px and tiles.patch_size_lv0:
            spacing_um = slide.spacing_um * tiles.patch_size_lv0 / tiles.patch_size_px
        tiles = replace(
            tiles,
            spacing_um=spacing_um,
            spacing_lv0_um=slide.spacing_um,
            width_px=slide.width_px,
            height_px=slide.height_px,
            magnification=tiles.magnification or slide.objective_power,
            slide_path=slide.path,
        )
    check_inside(tiles)
    return tiles


def _find(
    root: Path, slide_id: str, *, features: bool, seen: dict[Path, FileContents | None] | None = None
) -> Path | None:
    """The one file of a slide: of the first pattern of a layout that matches any that are the layout's.

    Files that were looked into are remembered in ``seen``, None for one that cannot be read.
    """
    seen = {} if seen is None else seen
    found: dict[Path, None] = {}
    for reader in FEATURE_READERS:
        for pattern in reader.feature_patterns if features else reader.coords_patterns:
            has = reader.has_features if features else reader.has_coords
            matching = map(Path, sorted(glob.glob(_pattern_of(root, pattern, slide_id))))
            ours = [path for path in matching if path.is_file() and _is_taken(path, pattern, has, seen)]
            if ours:
                found |= dict.fromkeys(ours)
                break
    if len(found) > 1:
        told = ", ".join(map(as_text, found))
        raise SlideError(
            f"a slide must have one file of {'features' if features else 'coordinates'} below a folder, got "
            f"{len(found)} for {shortened(slide_id)!r}: {told}; name the folder of one of them"
        )
    return next(iter(found), None)


def _is_taken(
    path: Path, pattern: str, has: Callable[[FileContents], bool], seen: dict[Path, FileContents | None]
) -> bool:
    """Whether a file that matches a pattern is the slide's: what has no other place there is, whatever it holds."""
    if path not in seen:
        try:
            seen[path] = look_into(path)
        except SlideError:
            seen[path] = None
    contents = seen[path]
    return contents is None or has(contents) or _FEATURES_ALONE.search(pattern) is not None


def _pattern_of(root: Path, pattern: str, slide_id: str) -> str:
    """A layout's pattern below a folder, for one slide."""
    return str(Path(glob.escape(str(root))) / pattern.format(id=glob.escape(slide_id)))


def _unknown(contents: FileContents) -> SlideError:
    if contents.kind == "pt":
        return SlideError(
            f"a .pt file of features must lie in CLAM's folder pt_files or slide2vec's tile_embeddings, with their "
            f"coordinates beside it, got {as_text(contents.path)}; name it there"
        )
    held = ", ".join(sorted(contents.names)[:20]) or "nothing"
    return SlideError(
        "a feature file must hold coords and features (TRIDENT, CLAM, AtlasPatch) or feats (STAMP), or be slide2vec's, "
        f"got {held} in {as_text(contents.path)}; name a file of one of these"
    )
