"""Files as other projects' code writes them, recognised and read."""

from __future__ import annotations

from pathlib import Path

import foreign_writers
import h5py
import numpy as np
import pytest
import torch
from foreign_writers import COORDS, FEATURES

from maskattn.errors import SlideError
from maskattn.slide import layouts
from maskattn.slide.reader import SlideInfo


def slide_info(spacing_um: float = 0.25, size: tuple[int, int] = (20_000, 10_000)) -> SlideInfo:
    return SlideInfo(
        path=Path("slides/slide-1.svs"),
        width_px=size[0],
        height_px=size[1],
        level_dimensions=(size, (size[0] // 4, size[1] // 4)),
        level_downsamples=((1.0, 1.0), (4.0, 4.0)),
        spacing_um=spacing_um,
        spacing_source="metadata",
        vendor="aperio",
        objective_power=40.0,
        properties={},
    )


def test_trident_features_and_coordinates(tmp_path: Path) -> None:
    path, coords_file = foreign_writers.write_as_trident(tmp_path, FEATURES, COORDS, overlap=16)
    for found in (layouts.read_features(path), layouts.read_coords(coords_file), layouts.read_coords(path)):
        np.testing.assert_array_equal(found.coords_T2, COORDS)
        assert (found.slide_id, found.layout, found.on_level0) == ("slide-1", "trident", True)
        assert (found.patch_size_px, found.patch_size_lv0, found.overlap_px, found.overlap_lv0) == (256, 512, 16, 32)
        assert (found.spacing_um, found.width_px, found.height_px, found.magnification) == (0.5, 20_000, 10_000, 40.0)
    features = layouts.read_features(path)
    np.testing.assert_array_equal(features.features_TC, FEATURES)
    assert (features.encoder, features.token_mask, features.features_TC.dtype) == ("uni_v1", None, np.float32)


@pytest.mark.parametrize("batch", [(), (1,)])
def test_a_leading_dimension_of_one_is_dropped(tmp_path: Path, batch: tuple[int, ...]) -> None:
    tables = {"features": FEATURES.reshape(*batch, 4, 3), "coords": COORDS.reshape(*batch, 4, 2)}
    found = layouts.read_features(foreign_writers.save_h5(tmp_path / "h5_files" / "slide-1.h5", tables))
    assert (found.layout, found.patch_size_lv0, found.patch_size_px) == ("clam", 512, None)
    np.testing.assert_array_equal(found.features_TC, FEATURES)


def test_clam_features_have_the_geometry_of_the_coordinates_beside_them(tmp_path: Path) -> None:
    path, tensor, coords_file = foreign_writers.write_as_clam(tmp_path, FEATURES, COORDS * 2)
    for found in (layouts.read_features(path), layouts.read_features(tensor), layouts.read_coords(coords_file)):
        np.testing.assert_array_equal(found.coords_T2, COORDS * 2)
        assert (found.slide_id, found.layout, found.patch_size_px, found.patch_size_lv0) == (
            "slide-1",
            "clam",
            256,
            1024,
        )
        assert (found.spacing_um, found.width_px, found.height_px) == (None, None, None)
    found = layouts.read_features(tensor, slide=slide_info())
    np.testing.assert_array_equal(found.features_TC, FEATURES)
    assert (found.spacing_um, found.width_px, found.height_px) == (1.0, 20_000, 10_000)


def test_clam_of_level_0_knows_its_slide(tmp_path: Path) -> None:
    *_, coords_file = foreign_writers.write_as_clam(tmp_path, FEATURES, COORDS, level=0, downsample=1.0)
    found = layouts.read_coords(coords_file, slide=slide_info())
    assert (found.patch_size_lv0, found.width_px, found.height_px, found.spacing_um) == (256, 20_000, 10_000, 0.25)


def test_clams_older_coordinates_take_their_levels_downsample_from_the_slide(tmp_path: Path) -> None:
    *_, coords_file = foreign_writers.write_as_clam(tmp_path, FEATURES, COORDS)
    with h5py.File(coords_file, "a") as file:
        del file["coords"].attrs["downsample"]
        file["coords"].attrs["custom_downsample"] = 2
    assert layouts.read_coords(coords_file, slide=slide_info()).patch_size_lv0 == 2048
    with pytest.raises(SlideError, match=r"got patch_level=1 alone .*; name the slide too"):
        layouts.read_coords(coords_file)


def test_a_tensor_of_clams_is_read_with_the_coordinates_of_patches_where_there_is_no_table(tmp_path: Path) -> None:
    path, tensor, coords_file = foreign_writers.write_as_clam(tmp_path, FEATURES, COORDS)
    path.unlink()
    np.testing.assert_array_equal(layouts.read_features(tensor).coords_T2, COORDS)
    coords_file.unlink()
    with pytest.raises(SlideError, match=r"need a file of their coordinates.*copy CLAM's folder"):
        layouts.read_features(tensor)


def test_stamps_micrometres_become_level_0_pixels_of_the_slide(tmp_path: Path) -> None:
    # STAMP's tiles are 256 µm: 1024 px of this slide, on a lattice that is not whole in its pixels.
    cells = np.array([[0, 0], [1, 0], [7, 3]])
    path = foreign_writers.write_as_stamp(
        tmp_path / "slide-1.h5", FEATURES[:3], cells * 256.0, **foreign_writers.STAMP_ATTRIBUTES
    )
    found = layouts.read_features(path, slide=slide_info(spacing_um=0.2523))
    np.testing.assert_array_equal(found.coords_T2, np.round(cells * 256 / 0.2523))
    assert (found.layout, found.encoder, found.patch_size_px, found.patch_size_lv0) == ("stamp", "uni2", 224, 1015)
    assert (found.on_level0, found.spacing_um, found.spacing_lv0_um) == (True, 256 / 224, 0.2523)
    assert (found.features_TC.dtype, found.slide_id) == (np.float16, "slide-1")


@pytest.mark.parametrize(
    ("attributes", "step"),
    [
        (foreign_writers.STAMP_ATTRIBUTES, 256.0),
        ({"tile_size": 256.0, "unit": "um", "tile_size_px": 224}, 256.0),
        ({}, 224.0),
    ],
)
def test_stamps_files_of_every_version_without_a_slide_are_in_the_pixels_of_their_tiles(
    tmp_path: Path, attributes: dict[str, object], step: float
) -> None:
    cells = np.array([[0, 0], [1, 0], [0, 2]])
    found = layouts.read_features(
        foreign_writers.write_as_stamp(tmp_path / "s.h5", FEATURES[:3], cells * step, **attributes)
    )
    np.testing.assert_array_equal(found.coords_T2, cells * 224)
    assert (found.on_level0, found.patch_size_px, found.patch_size_lv0) == (False, 224, 224)
    assert found.spacing_um == pytest.approx(256 / 224)
    assert found.spacing_lv0_um is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slide2vec_features_of_every_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    path = foreign_writers.write_as_slide2vec(tmp_path, torch.from_numpy(FEATURES).to(dtype), COORDS, overlap=0.25)
    found = layouts.read_features(path)
    np.testing.assert_array_equal(found.features_TC, FEATURES)
    assert found.features_TC.dtype == (np.float16 if dtype == torch.float16 else np.float32)
    np.testing.assert_array_equal(found.coords_T2, COORDS)
    assert (found.layout, found.encoder, found.slide_id, found.overlap_px) == ("slide2vec", "virchow2", "slide-1", 64)
    assert (found.patch_size_px, found.patch_size_lv0, found.spacing_um, found.spacing_lv0_um) == (256, 512, 0.5, 0.25)
    assert (found.width_px, found.height_px) == (20_000, 10_000)


def test_slide2vecs_archives_are_read_as_its_tensors_are(tmp_path: Path) -> None:
    path = foreign_writers.write_as_slide2vec(tmp_path, torch.from_numpy(FEATURES), COORDS)
    path.unlink()
    np.savez_compressed(path.with_suffix(".npz"), features=FEATURES, tile_index=np.arange(4))
    np.testing.assert_array_equal(layouts.read_features(path.with_suffix(".npz")).features_TC, FEATURES)


def test_hs2ps_coordinates(tmp_path: Path) -> None:
    foreign_writers.write_as_slide2vec(tmp_path, torch.from_numpy(FEATURES), COORDS)
    found = layouts.read_coords(tmp_path / "tiles" / "slide-1.coordinates.npz")
    np.testing.assert_array_equal(found.coords_T2, COORDS)
    assert (found.layout, found.slide_id, found.patch_size_lv0) == ("hs2p", "slide-1", 512)


def test_atlaspatch_features_of_the_encoder_that_is_asked_for(tmp_path: Path) -> None:
    path = foreign_writers.write_as_atlaspatch(tmp_path, {"uni_v2": FEATURES, "resnet50": FEATURES + 1}, COORDS)
    found = layouts.read_features(path, encoder="UNI_v2")
    np.testing.assert_array_equal(found.features_TC, FEATURES)
    np.testing.assert_array_equal(found.coords_T2, COORDS)
    assert (found.layout, found.encoder, found.slide_id) == ("atlaspatch", "uni_v2", "slide-1")
    assert (found.patch_size_px, found.patch_size_lv0, found.spacing_um, found.spacing_lv0_um) == (
        256,
        512,
        0.5,
        0.2525,
    )
    for asked in (None, "conch"):
        with pytest.raises(SlideError, match=r"got those of resnet50, uni_v2 in .*; name one of them"):
            layouts.read_features(path, encoder=asked)


def test_atlaspatch_coordinates_before_any_features(tmp_path: Path) -> None:
    path = foreign_writers.write_as_atlaspatch(tmp_path, {}, COORDS)
    np.testing.assert_array_equal(layouts.read_coords(path).coords_T2, COORDS)
    assert layouts.detect_layout(path).name == "atlaspatch"
    with pytest.raises(SlideError, match="a feature file must hold coords and features"):
        layouts.read_features(path)


def written(root: Path, layout: str) -> Path:
    """A feature file of a layout, in its own folder below the root."""
    if layout == "trident":
        return foreign_writers.write_as_trident(root, FEATURES, COORDS)[0]
    if layout == "clam":
        return foreign_writers.write_as_clam(root, FEATURES, COORDS)[0]
    if layout == "stamp":
        return foreign_writers.write_as_stamp(
            root / "uni2-0123abcd" / "slide-1.h5", FEATURES, COORDS / 2, **foreign_writers.STAMP_ATTRIBUTES
        )
    if layout == "slide2vec":
        return foreign_writers.write_as_slide2vec(root, torch.from_numpy(FEATURES), COORDS)
    return foreign_writers.write_as_atlaspatch(root, {"uni_v2": FEATURES}, COORDS)


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp", "slide2vec", "atlaspatch"])
def test_a_slides_features_are_found_from_the_folder_that_users_name(layout: str, tmp_path: Path) -> None:
    path = written(tmp_path, layout)
    assert layouts.detect_layout(path).name == layout
    folders = [folder for folder in path.parents if tmp_path in (folder, *folder.parents)]
    assert len(folders) > 1
    for root in folders:
        assert layouts.find_features(root, "slide-1") == path
        assert layouts.list_features(root) == {"slide-1": path}
        assert layouts.find_features(root, "slide-2") is None


@pytest.mark.parametrize("layout", ["trident", "clam", "slide2vec", "atlaspatch"])
def test_a_slides_coordinates_are_found_from_the_folder_that_users_name(layout: str, tmp_path: Path) -> None:
    written(tmp_path, layout)
    found = layouts.find_coords(tmp_path, "slide-1")
    assert found is not None
    assert found.parent.name in ("patches", "tiles")
    np.testing.assert_array_equal(layouts.read_coords(found, slide=slide_info()).coords_T2, COORDS)


def test_our_own_features_are_found_in_a_runs_output(tmp_path: Path) -> None:
    foreign_writers.write_as_trident(tmp_path / "elsewhere", FEATURES, COORDS)[0].rename(tmp_path / "features.h5")
    (tmp_path / "out" / "slide-1").mkdir(parents=True)
    path = (tmp_path / "features.h5").rename(tmp_path / "out" / "slide-1" / "features.h5")
    assert layouts.list_features(tmp_path / "out") == {"slide-1": path}


def test_features_of_earlier_versions_of_ours_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / "out" / "slide-1" / "features.h5"
    attributes = {name: value for name, value in foreign_writers.trident_coords().items() if name != "savetodir"}
    attributes |= {"level0_magnification": 39.6, "target_magnification": 19.8, "description": "level-0 x, y"}
    foreign_writers.save_h5(
        path, {"features": FEATURES, "coords": COORDS}, {"features": {"name": "slide-1"}, "coords": attributes}
    )
    found = layouts.read_features(path, slide=slide_info())
    np.testing.assert_array_equal(found.features_TC, FEATURES)
    assert (found.slide_id, found.patch_size_lv0, found.encoder, found.token_mask) == ("slide-1", 512, None, None)


def test_a_slides_name_with_characters_that_globs_use_is_found(tmp_path: Path) -> None:
    path = foreign_writers.write_as_trident(tmp_path, FEATURES, COORDS, name="a[1]*")[0]
    assert layouts.find_features(tmp_path, "a[1]*") == path
    assert layouts.list_features(tmp_path) == {"a[1]*": path}
