"""Each layout that is written, read by a reader that was written from its project's description."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from foreign_readers import (
    Read,
    read_as_clam_does,
    read_as_slide2vec_does,
    read_as_stamp_does,
    read_as_trident_does,
)

from maskattn.slide.layouts import FEATURE_LAYOUTS, TileFeatures, TileHeader, read_features, write_features

HEADER = TileHeader(
    slide_id="slide-1",
    patch_size_px=256,
    patch_size_lv0=507,
    spacing_um=0.5,
    width_px=20_000,
    height_px=10_000,
    spacing_lv0_um=0.2525,
    magnification=40.0,
    encoder="uni_v1",
    token_mask="none",
    slide_path=Path("slides/slide-1.svs"),
)
READERS: dict[str, Callable[[Path], Read]] = {
    "trident": lambda root: read_as_trident_does(root, "slide-1", "uni_v1", 20, 256, 0),
    "clam": lambda root: read_as_clam_does(root, "slide-1"),
    "stamp": lambda root: read_as_stamp_does(root / "uni_v1", "slide-1.h5", 0.2525, (2, 5, 0)),
    "slide2vec": lambda root: read_as_slide2vec_does(root, "slide-1"),
}


def drawn(tiles: int = 37, channels: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features and level-0 positions on a grid of 507 px, row-major."""
    rng = np.random.default_rng(seed)
    cells = np.sort(rng.choice(19 * 39, tiles, replace=False))
    coords = np.stack((cells % 39, cells // 39), axis=1) * 507
    return rng.normal(size=(tiles, channels)).astype(np.float32), coords


def by_place(features: np.ndarray, xy: np.ndarray) -> dict[tuple[int, ...], list[float]]:
    return {tuple(map(int, place)): row.tolist() for place, row in zip(xy, features, strict=True)}


@pytest.mark.parametrize("layout", READERS)
def test_features_written_in_batches_are_what_the_projects_own_reader_finds(layout: str, tmp_path: Path) -> None:
    features, coords = drawn()
    with FEATURE_LAYOUTS[layout].writing(tmp_path, HEADER, 5) as take:
        for first in range(0, 37, 8):
            take(features[first : first + 8], coords[first : first + 8], np.full(len(coords[first : first + 8]), 0.75))
        assert not FEATURE_LAYOUTS[layout].path_of(tmp_path, HEADER).exists()
    assert FEATURE_LAYOUTS[layout].path_of(tmp_path, HEADER).is_file()
    found = READERS[layout](tmp_path)
    expected = features.astype(np.float16) if layout == "stamp" else features
    assert by_place(found.features, found.xy) == by_place(expected, coords)
    assert (found.side_lv0, found.name) == (507, "slide-1")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_slide2vecs_tissue_fractions_are_those_of_the_tiles_and_nan_where_none_are_given(tmp_path: Path) -> None:
    features, coords = drawn(tiles=4)
    with FEATURE_LAYOUTS["slide2vec"].writing(tmp_path, HEADER, 5) as take:
        take(features[:2], coords[:2], np.array([0.25, 1.0]))
        take(features[2:], coords[2:], None)
    with np.load(tmp_path / "tiles" / "slide-1.coordinates.npz") as npz:
        order = np.lexsort((coords[:, 1], coords[:, 0]))
        np.testing.assert_array_equal(npz["tissue_fractions"], np.array([0.25, 1.0, np.nan, np.nan], np.float32)[order])


@pytest.mark.parametrize("layout", READERS)
def test_what_is_written_is_read_back_with_all_its_metadata(layout: str, tmp_path: Path) -> None:
    features, coords = drawn()
    whole = TileFeatures(
        **vars(HEADER), features_TC=features, coords_T2=coords, layout="trident", source=tmp_path / "none"
    )
    path = write_features(layout, tmp_path, whole)
    found = read_features(path)
    expected = features.astype(np.float16) if layout == "stamp" else features
    assert by_place(found.features_TC, found.coords_T2) == by_place(expected, coords)
    assert (found.layout, found.source, found.on_level0, found.coords_T2.dtype) == (layout, path, True, np.int64)
    told = {name: getattr(found, name) for name in vars(HEADER)}
    unsaid = {"trident": {"slide_path"}, "stamp": {"slide_path", "magnification"}, "slide2vec": {"magnification"}}
    # CLAM's tensor comes with nothing but the coordinates of its tiles.
    unsaid["clam"] = {"slide_path", "magnification", "encoder", "token_mask"}
    assert told == {name: None if name in unsaid[layout] else value for name, value in vars(HEADER).items()}


def test_clams_table_tells_the_encoder_and_the_token_mask_where_the_tensor_cannot(tmp_path: Path) -> None:
    features, coords = drawn()
    with FEATURE_LAYOUTS["clam"].writing(tmp_path, replace(HEADER, token_mask="tissue"), 5) as take:
        take(features, coords, None)
    found = read_features(tmp_path / "h5_files" / "slide-1.h5")
    assert (found.encoder, found.token_mask) == ("uni_v1", "tissue")


@pytest.mark.parametrize("layout", READERS)
def test_overlap_is_recorded_in_each_projects_words(layout: str, tmp_path: Path) -> None:
    features, coords = drawn()
    header = replace(HEADER, overlap_px=32)
    with FEATURE_LAYOUTS[layout].writing(tmp_path, header, 5) as take:
        take(features, coords, None)
    assert read_features(FEATURE_LAYOUTS[layout].path_of(tmp_path, header)).overlap_px == 32
    if layout == "trident":
        read_as_trident_does(tmp_path, "slide-1", "uni_v1", 20, 256, 32)


@pytest.mark.parametrize("layout", READERS)
def test_a_slide_without_tiles_has_a_file_that_says_so(layout: str, tmp_path: Path) -> None:
    with FEATURE_LAYOUTS[layout].writing(tmp_path, HEADER, 5):
        pass
    found = read_features(FEATURE_LAYOUTS[layout].path_of(tmp_path, HEADER))
    assert (found.features_TC.shape, found.coords_T2.shape) == ((0, 5), (0, 2))


@pytest.mark.parametrize("layout", READERS)
def test_an_aborted_run_leaves_the_old_files_and_no_others(layout: str, tmp_path: Path) -> None:
    features, coords = drawn()
    with FEATURE_LAYOUTS[layout].writing(tmp_path, HEADER, 5) as take:
        take(features, coords, None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def break_off() -> None:
        with FEATURE_LAYOUTS[layout].writing(tmp_path, HEADER, 5) as take:
            take(features[:3] + 1, coords[:3], None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("layout", ["trident", "slide2vec"])
def test_half_precision_stays_half_precision(layout: str, tmp_path: Path) -> None:
    features, coords = drawn()
    with FEATURE_LAYOUTS[layout].writing(tmp_path, HEADER, 5, np.float16) as take:
        take(features.astype(np.float16), coords, None)
    found = read_features(FEATURE_LAYOUTS[layout].path_of(tmp_path, HEADER))
    assert found.features_TC.dtype == np.float16
    assert by_place(found.features_TC, found.coords_T2) == by_place(features.astype(np.float16), coords)


def test_stamp_refuses_features_that_half_precision_has_no_room_for(tmp_path: Path) -> None:
    features, coords = drawn()
    features[3, 2] = 70_000.0

    def write() -> None:
        with FEATURE_LAYOUTS["stamp"].writing(tmp_path, HEADER, 5) as take:
            take(features, coords, None)

    with pytest.raises(ValueError, match=r"up to ±65,504.*got 70000 .*another --layout"):
        write()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"slide_id": "a/b"}, "must name a folder"), ({"patch_size_lv0": None, "spacing_lv0_um": None}, "must have")],
)
@pytest.mark.parametrize("layout", READERS)
def test_a_header_that_a_layout_cannot_write_is_refused_before_anything_is_written(
    layout: str, changed: dict[str, object], message: str, tmp_path: Path
) -> None:
    def write() -> None:
        with FEATURE_LAYOUTS[layout].writing(tmp_path, replace(HEADER, **changed), 5):
            raise AssertionError("it was opened")

    with pytest.raises(ValueError, match=message):
        write()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("layout", READERS)
def test_rows_of_another_width_are_refused(layout: str, tmp_path: Path) -> None:
    features, coords = drawn()

    def write() -> None:
        with FEATURE_LAYOUTS[layout].writing(tmp_path, HEADER, 6) as take:
            take(features, coords, None)

    with pytest.raises(ValueError, match="must have 6 columns"):
        write()


def test_an_encoders_name_that_no_folder_can_have_is_kept_in_the_file(tmp_path: Path) -> None:
    features, coords = drawn()
    header = replace(HEADER, encoder="hf-hub:MahmoodLab/UNI2-h")
    with FEATURE_LAYOUTS["trident"].writing(tmp_path, header, 5) as take:
        take(features, coords, None)
    path = tmp_path / "20x_256px_0px_overlap" / "features_hf-hub_MahmoodLab_UNI2-h" / "slide-1.h5"
    assert read_features(path).encoder == "hf-hub:MahmoodLab/UNI2-h"


def test_an_unknown_layout_is_refused_with_those_there_are(tmp_path: Path) -> None:
    features, coords = drawn()
    whole = TileFeatures(**vars(HEADER), features_TC=features, coords_T2=coords, layout="x", source=tmp_path)
    with pytest.raises(ValueError, match="one of trident, clam, stamp, slide2vec, got 'tiatoolbox'"):
        write_features("tiatoolbox", tmp_path, whole)


def test_the_layouts_import_no_torch() -> None:
    code = "import sys, maskattn.slide.layouts; assert 'torch' not in sys.modules, 'torch'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


MEASURED = """
import resource, sys
import numpy as np
from maskattn.slide.layouts import FEATURE_LAYOUTS, TileHeader, read_features
import h5py
layout, root, tiles, channels = sys.argv[1], sys.argv[2], 20_000, 1_024
if layout in ("clam", "slide2vec"):
    import torch
header = TileHeader(slide_id="s", patch_size_px=256, patch_size_lv0=256, spacing_um=0.5, width_px=100_000,
                    height_px=100_000, spacing_lv0_um=0.5, encoder="e")
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
from pathlib import Path
with FEATURE_LAYOUTS[layout].writing(Path(root), header, channels) as take:
    base = peak()
    for first in range(0, tiles, 500):
        rows = np.arange(first, first + 500)
        coords = np.stack((rows % 200, rows // 200), axis=1) * 256
        take(np.broadcast_to((rows % 7).astype(np.float32)[:, None], (500, channels)), coords, None)
    streamed = peak()
found = read_features(FEATURE_LAYOUTS[layout].path_of(Path(root), header))
assert found.features_TC.shape == (tiles, channels)
print(base, streamed, peak(), tiles * channels * 4 / 2**20)
"""


@pytest.mark.parametrize("layout", READERS)
def test_writing_holds_one_batch_in_memory_and_reading_the_features_once(layout: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURED, layout, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    base, streamed, read, whole = map(float, result.stdout.split())
    assert streamed - base < whole / 2
    assert read - base < 1.4 * whole
