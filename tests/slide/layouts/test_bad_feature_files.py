"""Broken files of features and coordinates are refused with one sentence, and code in them never runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import foreign_writers
import h5py
import numpy as np
import pytest
import torch
from foreign_writers import COORDS, FEATURES

from maskattn.errors import SlideError
from maskattn.slide.layouts import detect_layout, find_coords, find_features, list_features, read_coords, read_features
from maskattn.slide.reader import SlideInfo

WRITERS: dict[str, Callable[[Path, np.ndarray, np.ndarray], Path]] = {
    "trident": lambda root, features, coords: foreign_writers.write_as_trident(root, features, coords)[0],
    "clam": lambda root, features, coords: foreign_writers.write_as_clam(root, features, coords)[0],
    "clam's tensor": lambda root, features, coords: foreign_writers.write_as_clam(root, features, coords)[1],
    "stamp": lambda root, features, coords: foreign_writers.write_as_stamp(
        root / "slide-1.h5", features, coords * 0.25, **foreign_writers.STAMP_ATTRIBUTES
    ),
    "slide2vec": lambda root, features, coords: foreign_writers.write_as_slide2vec(
        root, torch.from_numpy(features), coords
    ),
    "atlaspatch": lambda root, features, coords: foreign_writers.write_as_atlaspatch(root, {"uni": features}, coords),
}


def info(width_px: int = 20_000, height_px: int = 10_000) -> SlideInfo:
    size = (width_px, height_px)
    return SlideInfo(Path("slides/slide-1.svs"), *size, (size,), ((1.0, 1.0),), 0.25, "metadata", "aperio", 40.0, {})


@pytest.mark.parametrize("layout", WRITERS)
def test_features_of_another_number_than_the_coordinates_are_refused(layout: str, tmp_path: Path) -> None:
    path = WRITERS[layout](tmp_path, FEATURES[:3], COORDS)
    with pytest.raises(SlideError, match=r"a row of features for each tile, got .*\(3, 3\) for 4 coordinates"):
        read_features(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("layout", WRITERS)
def test_features_that_are_not_numbers_are_refused(layout: str, value: float, tmp_path: Path) -> None:
    features = FEATURES.copy()
    features[2:, 1] = value
    path = WRITERS[layout](tmp_path, features, COORDS)
    with pytest.raises(
        SlideError, match=r"must be finite, got NaN or infinite ones for 2 of 4 tiles \(the first is tile 2"
    ):
        read_features(path)


@pytest.mark.parametrize("layout", WRITERS)
def test_coordinates_outside_the_slide_are_refused(layout: str, tmp_path: Path) -> None:
    coords = COORDS.copy()
    coords[3] = (20_480, 0)
    path = WRITERS[layout](tmp_path, FEATURES, coords)
    with pytest.raises(SlideError, match=r"must lie in the slide of 20000 × 10000 .*1 of 4 tiles .*at x=20480, y=0"):
        read_features(path, slide=info())


@pytest.mark.parametrize("x", [-512, 20_000])
def test_tiles_may_hang_over_the_edge_but_not_lie_beyond_it(x: int, tmp_path: Path) -> None:
    coords = COORDS.copy()
    coords[3] = (19_999, 9_999)
    assert len(read_features(foreign_writers.write_as_trident(tmp_path, FEATURES, coords)[0]).coords_T2) == 4
    coords[3, 0] = x
    path, coords_file = foreign_writers.write_as_trident(tmp_path, FEATURES, coords)
    for read in (lambda: read_features(path), lambda: read_coords(coords_file)):
        with pytest.raises(SlideError, match=f"the first at x={x}, y=9999"):
            read()


@pytest.mark.parametrize("layout", ["trident", "slide2vec", "atlaspatch"])
def test_features_of_a_slide_of_another_size_are_refused(layout: str, tmp_path: Path) -> None:
    path = WRITERS[layout](tmp_path, FEATURES, COORDS)
    with pytest.raises(SlideError, match=r"of this slide of 30000 × 10000 .* of a slide of 20000 × 10000"):
        read_features(path, slide=info(30_000))


@pytest.mark.parametrize("layout", WRITERS)
def test_features_of_a_slide_of_another_name_are_refused(layout: str, tmp_path: Path) -> None:
    path = WRITERS[layout](tmp_path, FEATURES, COORDS)
    assert read_features(path, slide=info(), named=("case-7", "slide-1")).slide_id == "slide-1"
    with pytest.raises(SlideError, match="must be of the slide 'case-7', got one of 'slide-1'"):
        read_features(path, slide=info(), named=("case-7", "slide-2"))


def test_a_file_that_was_copied_to_another_slides_name_is_found_out(tmp_path: Path) -> None:
    path, _ = foreign_writers.write_as_trident(tmp_path, FEATURES, COORDS)
    copied = path.rename(path.with_name("slide-2.h5"))
    with pytest.raises(SlideError, match="must be of the slide 'slide-2', got one of 'slide-1'"):
        read_features(copied, named=("slide-2",))
    embeddings = foreign_writers.write_as_slide2vec(tmp_path / "s2v", torch.from_numpy(FEATURES), COORDS)
    tiles = embeddings.parent.parent / "tiles"
    (tiles / "slide-1.coordinates.npz").rename(tiles / "slide-2.coordinates.npz")
    (tiles / "slide-1.coordinates.meta.json").rename(tiles / "slide-2.coordinates.meta.json")
    with pytest.raises(SlideError, match=r"must have the .meta.json of their slide, got one of 'slide-1'"):
        read_coords(tiles / "slide-2.coordinates.npz")


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("damage", ["cut short", "no such format", "empty", "zeros within"])
def test_a_damaged_file_is_reported_and_never_read_partially(layout: str, damage: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cells = np.arange(3000)
    coords = np.stack((cells % 60, cells // 60), axis=1).astype(np.int64) * 512 // 4
    path = WRITERS[layout](tmp_path, rng.normal(size=(3000, 16)).astype(np.float32), coords)
    whole = path.read_bytes()
    damaged = {
        "cut short": whole[: len(whole) // 2],
        "no such format": b"<html>404</html>" * 100,
        "empty": b"",
        "zeros within": bytes(200) + whole[200:],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(
        SlideError, match=r"must (be complete and readable|hold a tensor and nothing that runs code)"
    ) as told:
        read_features(path)
    assert str(path) in str(told.value)
    assert len(str(told.value)) < 800


def test_a_damaged_sidecar_is_reported(tmp_path: Path) -> None:
    path = foreign_writers.write_as_slide2vec(tmp_path, torch.from_numpy(FEATURES), COORDS)
    sidecar = tmp_path / "tiles" / "slide-1.coordinates.meta.json"
    whole = sidecar.read_text()
    for text in ("{", "[]", json.dumps({"provenance": {}}), whole.replace("10000", '"high"')):
        sidecar.write_text(text)
        with pytest.raises(SlideError, match=r"complete and readable, got .*slide-1.coordinates.meta.json"):
            read_features(path)
    sidecar.unlink()
    with pytest.raises(SlideError, match="No such file"):
        read_features(path)
    sidecar.write_text(whole)
    (tmp_path / "tile_embeddings" / "slide-1.meta.json").write_text("no json")
    with pytest.raises(SlideError, match=r"complete and readable, got .*tile_embeddings"):
        read_features(path)


class Harmful:
    """Runs a command where it is unpickled by a reader that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", ["clam's tensor", "slide2vec"])
def test_code_in_a_tensor_file_is_refused_and_never_runs(layout: str, zipped: bool, tmp_path: Path) -> None:
    path = WRITERS[layout](tmp_path, FEATURES, COORDS)
    mark = tmp_path / "it ran".replace(" ", "-")
    torch.save(
        {"features": torch.from_numpy(FEATURES), "x": Harmful(mark)}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(
        SlideError, match=r"must hold a tensor and nothing that runs code, got .*system.*save the tensor"
    ):
        read_features(path)
    assert not mark.exists()


def test_code_in_an_archive_is_refused_and_never_runs(tmp_path: Path) -> None:
    path = foreign_writers.write_as_slide2vec(tmp_path, torch.from_numpy(FEATURES), COORDS)
    mark = tmp_path / "it-ran"
    archive = path.with_suffix(".npz")
    np.savez(archive, features=np.array([Harmful(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(SlideError, match="allow_pickle=False"):
        read_features(archive)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("held", "kind"),
    [
        ({"features": torch.zeros(4, 3)}, "a dict"),
        (torch.zeros(4, 3, dtype=torch.int64), "a tensor of torch.int64"),
        (torch.zeros(4, 3).to_sparse(), "a tensor of torch.float32"),
    ],
)
def test_a_tensor_file_of_something_else_is_refused(held: object, kind: str, tmp_path: Path) -> None:
    path = foreign_writers.write_as_clam(tmp_path, FEATURES, COORDS)[1]
    torch.save(held, path)
    with pytest.raises(SlideError, match=f"must hold one tensor of floats, got {kind}"):
        read_features(path)


def test_a_tensor_without_a_home_is_refused(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(FEATURES), tmp_path / "slide-1.pt")
    with pytest.raises(SlideError, match=r"must lie in CLAM's folder pt_files or slide2vec's tile_embeddings"):
        read_features(tmp_path / "slide-1.pt")
    path = foreign_writers.write_as_slide2vec(tmp_path / "s2v", torch.from_numpy(FEATURES), COORDS)
    (tmp_path / "s2v" / "tiles" / "slide-1.coordinates.npz").unlink()
    with pytest.raises(SlideError, match=r"must have their coordinates, got no file .*copy its folder tiles too"):
        read_features(path)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"other": FEATURES}, "must hold coords and features .*got other"),
        ({"features": FEATURES}, "got features in"),
        ({"features": FEATURES, "coords": COORDS.T}, "got coords, features in"),
        ({"features": FEATURES[0], "coords": COORDS}, "must have rows and columns, got features.shape"),
        ({"features": FEATURES, "coords": COORDS + 0.5}, "must be whole level-0 pixels, got 0.5"),
        ({"features": FEATURES, "coords": COORDS * np.nan}, "must be whole level-0 pixels, got nan"),
        ({"feats": FEATURES, "coords": COORDS}, "state tile_size_um or have a stride of 224 px"),
    ],
)
def test_tables_of_no_known_layout_are_refused_with_a_list_of_their_contents(
    tables: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SlideError, match=message):
        read_features(foreign_writers.save_h5(tmp_path / "slide-1.h5", tables))


@pytest.mark.parametrize(("name", "message"), [("gone.h5", "must exist, got no file"), ("a.csv", "must end in .h5")])
def test_a_path_that_is_not_a_feature_file_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    for read in (read_features, read_coords, detect_layout):
        with pytest.raises(SlideError, match=message):
            read(tmp_path / name)


def test_two_files_of_one_slide_are_refused_with_both_names(tmp_path: Path) -> None:
    path, coords_file = foreign_writers.write_as_trident(tmp_path, FEATURES, COORDS)
    other = (
        foreign_writers.save_h5(tmp_path / "10x_256px_0px_overlap" / "features_uni_v1" / "x.h5", {}).parent / path.name
    )
    path.with_name(path.name).replace(other)
    foreign_writers.write_as_trident(tmp_path, FEATURES, COORDS)
    for find in (lambda: find_features(tmp_path, "slide-1"), lambda: list_features(tmp_path)):
        with pytest.raises(
            SlideError, match=r"one file of features .* got 2 for 'slide-1': .*10x_.*, .*20x_.*; name the folder"
        ):
            find()
    assert find_features(path.parent, "slide-1") == path
    twice = tmp_path / "10x_256px_0px_overlap" / "patches" / coords_file.name
    twice.parent.mkdir()
    twice.write_bytes(coords_file.read_bytes())
    with pytest.raises(SlideError, match="one file of coordinates"):
        find_coords(tmp_path, "slide-1")


def test_two_slides_of_one_id_in_stamps_folders_are_refused(tmp_path: Path) -> None:
    for case in ("case-1", "case-2"):
        foreign_writers.write_as_stamp(
            tmp_path / case / "slide-1.h5", FEATURES, COORDS * 0.25, **foreign_writers.STAMP_ATTRIBUTES
        )
    with pytest.raises(SlideError, match=r"got 2 for 'slide-1': .*case-1.*, .*case-2"):
        list_features(tmp_path)


@pytest.mark.parametrize("layout", ["trident", "stamp", "atlaspatch", "clam"])
def test_a_file_that_cannot_be_read_holds_no_other_slide_up(layout: str, tmp_path: Path) -> None:
    path = WRITERS[layout](tmp_path, FEATURES, COORDS)
    broken = path.with_name("slide-2.h5")
    broken.write_bytes(path.read_bytes()[:100])
    assert list_features(tmp_path) == {"slide-1": path, "slide-2": broken}
    assert find_features(tmp_path, "slide-2") == broken
    with pytest.raises(SlideError, match=r"must be complete and readable, got .*slide-2\.h5"):
        read_features(broken)


def test_a_file_without_coordinates_among_features_is_not_passed_over(tmp_path: Path) -> None:
    path = WRITERS["trident"](tmp_path, FEATURES, COORDS)
    lone = foreign_writers.save_h5(path.with_name("slide-2.h5"), {"features": FEATURES})
    assert list_features(tmp_path) == {"slide-1": path, "slide-2": lone}
    with pytest.raises(SlideError, match=r"must hold coords and features .*, got features in .*slide-2\.h5"):
        read_features(lone)


def test_a_folder_without_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="got none in"):
        list_features(tmp_path)
    with pytest.raises(SlideError, match="got no folder"):
        list_features(tmp_path / "gone")


def test_a_half_written_feature_set_of_atlaspatch_is_not_one_of_its_encoders(tmp_path: Path) -> None:
    path = foreign_writers.write_as_atlaspatch(tmp_path, {"uni": FEATURES}, COORDS)
    with h5py.File(path, "a") as file:
        file["features"]["__tmp_conch"] = FEATURES[:2]
    assert read_features(path).encoder == "uni"
