"""Masks, regions of interest and exclusions from GeoJSON, judged by shapely and by the tokens that are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from geojson_files import box, feature, polygon, ring, write
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import AREAS_WITHOUT_EFFECT, assert_refused

from maskattn.errors import SlideError
from maskattn.nn.slide_model import SlideModel
from maskattn.slide.grid import TokenGrid, make_grid
from maskattn.slide.manifest import SlideJob
from maskattn.slide.outlines.coverage import edges_of, share_covered
from maskattn.slide.outlines.reading import read_outlines
from maskattn.slide.reader import SlideInfo
from maskattn.slide.request import RunSettings
from maskattn.slide.run import run_slides
from maskattn.slide.tissue import TissueMask, limit_tissue, load_mask

WIDTH, HEIGHT = 1000, 700


def info_of(width: int = WIDTH, height: int = HEIGHT, spacing_um: float = 1.0) -> SlideInfo:
    return SlideInfo(
        Path("slide"), width, height, ((width, height),), ((1.0, 1.0),), spacing_um, "metadata", None, None, {}
    )


def grid_of(tissue: TissueMask, info: SlideInfo, tile_px: int = 64, token_px: int = 16) -> TokenGrid:
    return make_grid(info, tissue, tile_px=tile_px, token_px=token_px, spacing_um=1.0)


def kept_boxes(grid: TokenGrid) -> list[list[float]]:
    """Left, top, right and bottom of every kept token, within the slide."""
    tile, row, column = np.nonzero(grid.token_keep_THW)
    x = grid.coords_lv0[tile, 0] + column * grid.tile_lv0 / grid.token_keep_THW.shape[2]
    y = grid.coords_lv0[tile, 1] + row * grid.tile_lv0 / grid.token_keep_THW.shape[1]
    boxes = np.stack([x, y, x + grid.token_lv0, y + grid.token_lv0], axis=1)
    return boxes.clip(0, [grid.width_px, grid.height_px] * 2).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_shares_of_squares_are_those_of_shapely(seed: int) -> None:
    rng = np.random.default_rng(seed)
    discs = [shapely.Point(*rng.uniform(-5, 45, 2)).buffer(rng.uniform(0.1, 15), quad_segs=3) for _ in range(3)]
    triangles = [shapely.Polygon(rng.integers(0, 40, (3, 2))) for _ in range(2)]
    hole = shapely.Point(*rng.uniform(0, 40, 2)).buffer(rng.uniform(1, 10))
    area = shapely.union_all(discs + [one for one in triangles if one.is_valid]).difference(hole)
    (x, y), side = rng.uniform(-3, 10, 2), tuple(rng.uniform(0.5, 7, 2))
    shape = tuple(int(length) for length in rng.integers(1, 10, 2))
    expected = [
        [
            area.intersection(
                shapely.box(x + c * side[0], y + r * side[1], x + (c + 1) * side[0], y + (r + 1) * side[1])
            ).area
            / (side[0] * side[1])
            for c in range(shape[1])
        ]
        for r in range(shape[0])
    ]
    np.testing.assert_allclose(share_covered(edges_of(area), x, y, side, shape), expected, atol=1e-9)


@pytest.mark.parametrize("spacing_um", [1.0, 0.2517, 0.7])
@pytest.mark.parametrize("decimals", [2, 4, 12])
def test_outlines_of_tokens_keep_those_tokens_and_no_others(tmp_path: Path, spacing_um: float, decimals: int) -> None:
    info = info_of(1003, 777, spacing_um)
    rng = np.random.default_rng(0)
    mask = rng.random((78, 100)) < 0.3
    first = grid_of(TissueMask(mask, 10 * spacing_um, (10.03, 777 / 78), "file", 0.3), info)
    boxes = np.round(kept_boxes(first), decimals).tolist()
    path = write(tmp_path / "tokens.geojson", *(feature(polygon(box(*one))) for one in boxes))
    again = grid_of(load_mask(path, info), info)
    np.testing.assert_array_equal(again.coords_lv0, first.coords_lv0)
    np.testing.assert_array_equal(again.token_keep_THW, first.token_keep_THW)


def test_a_run_on_the_tokens_of_a_run_keeps_those_tokens(
    model: SlideModel, slide: Path, tmp_path: Path, settings: RunSettings
) -> None:
    first = replace(settings, out_dir=tmp_path / "first", tokens=True, geojson="tokens")
    (before,) = run_slides([SlideJob("disc", slide)], model, first)
    path = first.out_dir / "disc" / "relevance.geojson"
    second = replace(first, out_dir=tmp_path / "second")
    (after,) = run_slides([SlideJob("disc", slide, path)], model, second)
    assert after.status == "ok", after.reason
    assert after.prediction.counts == before.prediction.counts
    assert after.prediction.tissue["method"] == "outlines"
    for name in before.prediction.scores:
        assert after.prediction.scores[name] == pytest.approx(before.prediction.scores[name], abs=1e-6)

    def kept_squares(of: Path) -> list[Any]:
        return [one["geometry"] for one in json.loads((of / "disc" / "relevance.geojson").read_text())["features"]]

    assert kept_squares(first.out_dir) == kept_squares(second.out_dir)


def test_holes_multipolygons_and_collections_count_with_their_area(tmp_path: Path) -> None:
    holed = polygon(box(100, 100, 300, 300), box(150, 150, 250, 250))
    several = {"type": "MultiPolygon", "coordinates": [[box(400, 100, 500, 200)], [box(600, 100, 700, 200)]]}
    collected = {"type": "GeometryCollection", "geometries": [polygon(box(0, 600, 50, 650)), several]}
    path = write(tmp_path / "areas.geojson", feature(holed), feature(several), feature(collected))
    area = read_outlines(path, info_of()).area
    assert area.area == 200**2 - 100**2 + 2 * 100**2 + 50**2
    assert not area.contains(shapely.Point(200, 200))


@pytest.mark.parametrize("bare", [True, False])
def test_qupaths_ways_of_writing_are_read(tmp_path: Path, bare: bool) -> None:
    """A bare list, children in their parents, classes of earlier versions, derived classes, text alone."""
    child = feature(polygon(box(0, 0, 10, 10)), {"names": ["Tumor", "Positive"], "color": [1, 2, 3]})
    parent = feature(polygon(box(100, 0, 110, 10)), {"name": "Stroma", "colorRGB": -3670016}, childObjects=[child])
    text = feature(polygon(box(200, 0, 210, 10)), None, classification="Necrosis")
    ignored = feature(polygon(box(300, 0, 310, 10)), "Ignore*")
    plain = {**feature(polygon(box(400, 0, 410, 10))), "properties": None}
    path = write(tmp_path / "q.geojson", parent, text, ignored, plain, bare=bare)
    info = info_of()
    assert read_outlines(path, info).area.area == 400
    assert read_outlines(path, info).notes == ("1 features of the class Ignore* were left out",)
    for name, left in (("Tumor: Positive", 0), ("Stroma", 100), ("Necrosis", 200), ("Ignore*", 300)):
        assert read_outlines(path, info, [name]).area.bounds == (left, 0, left + 10, 10)
    assert read_outlines(path, info, ["Stroma", "Necrosis"]).area.area == 200


def test_tridents_contours_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trident.geojson"
    contour = ring((100.5, 100.5), (300.25, 110), (250, 400))
    collection = {
        "type": "FeatureCollection",
        "name": "slide",
        "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}},
        "features": [{"type": "Feature", "properties": {"tissue_id": 0}, "geometry": polygon(contour)}],
    }
    path.write_text(json.dumps(collection))
    assert read_outlines(path, info_of()).area.equals(shapely.Polygon(contour))


@pytest.mark.parametrize("content", [polygon(box(0, 0, 9, 9)), feature(polygon(box(0, 0, 9, 9)))])
def test_a_geometry_or_a_feature_alone_is_read(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "one.geojson"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(content, indent=2).encode())
    assert read_outlines(path, info_of()).area.area == 81


def test_an_outline_that_crosses_itself_contains_what_it_encloses(tmp_path: Path) -> None:
    bow_tie = polygon(ring((0, 0), (100, 100), (100, 0), (0, 100)))
    twice = polygon(ring((200, 0), (300, 0), (300, 100), (200, 100), (200, 0), (300, 0), (300, 100), (200, 100)))
    outlines = read_outlines(write(tmp_path / "x.geojson", feature(bow_tie), feature(twice)), info_of())
    assert outlines.area.area == pytest.approx(5000 + 10000)
    (note,) = outlines.notes
    assert note.startswith("2 of 2 outlines cross or touch themselves and were mended; the first: Self-intersection[50")


def test_an_open_ring_is_closed_and_a_third_number_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "open.geojson", feature(polygon([[0, 0, 5], [10, 0], [10, 10, 5], [0, 10, 5]])))
    assert read_outlines(path, info_of()).area.area == 100


def test_what_reaches_beyond_the_edge_is_cut_off_with_a_note(tmp_path: Path) -> None:
    outlines = read_outlines(write(tmp_path / "o.geojson", feature(polygon(box(-20, -20, 100, 100)))), info_of())
    assert outlines.area.bounds == (0, 0, 100, 100)
    assert outlines.notes == ("1 outlines reach beyond the slide's edge; what lies beyond was cut off",)


WRONG = [
    ("", "where at line 1, column 1 JSON goes wrong"),
    ('{"type": "FeatureCollection", "features": [', "where at line 1, column 44 JSON goes wrong"),
    ('{"features": [{}\n{}]}', "where at line 2, column 1 JSON goes wrong: Expecting ','"),
    ('{"features": []} x', "JSON goes wrong: Extra data"),
    ("{features: []}", "Expecting property name"),
    ("[" * 100_000, "nested in lists beyond measure"),
    ('[{"a":' + "9" * 5000 + "}]", "a number is too long"),
    (b'{"name": "\xff"}', "byte 11 is not UTF-8"),
    ("{}", "got no feature in"),
    ('{"features": [null]}', "a feature of GeoJSON must be an object, got None as feature 1 of"),
    ('{"features": [{"geometry": null}]}', "got 1 features without any in"),
    ([feature({"type": "Point", "coordinates": [1, 2]})], "got 1 features without any in"),
    ([feature({"type": "Circle", "coordinates": [1, 2]})], "got 'Circle' in feature 1"),
    ([feature([1, 2])], "a geometry must be one of GeoJSON's"),
    ([feature({"type": "MultiPolygon"})], "a geometry must be one of GeoJSON's, with its coordinates"),
    ([feature({"type": "Polygon", "coordinates": []})], "a polygon must be a list of rings, got []"),
    ([feature(polygon([]))], "a ring must be a list of positions, each of two numbers, got []"),
    ([feature(polygon([1, 2, 3]))], "each of two numbers"),
    ([feature(polygon([[1, "2"], [3, 4]]))], "each of two numbers"),
    ([feature(polygon([[1, None], [3, 4]]))], "each of two numbers"),
    ([feature(polygon([[1], [3]]))], "each of two numbers"),
    ([feature(polygon([[1, 1], [3, 4]]))], "a ring must have three corners at least, got 2 in feature 1"),
    ([feature(polygon(ring((1, 1), (2, 2), (3, 3))))], "got 1 features without any in"),
    ([feature(polygon(box(0, 0, 2000, 100)))], "where x goes from 0 to 1000 px, got x from 0 to 2000 in feature 1"),
    ([feature(polygon(box(0, -90, 10, -20)))], "where y goes from 0 to 700 px, got y from -90 to -20"),
    ([feature(polygon([[float("nan"), 1], [3, 4], [5, 6]]))], "got x from nan to nan"),
    ([feature(polygon([[1e400, 1], [3, 4], [5, 6]]))], "to inf in feature 1"),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_files_that_are_not_outlines_are_refused_with_the_rule_the_value_and_a_remedy(
    tmp_path: Path, content: Any, words: str
) -> None:
    path = tmp_path / "wrong.geojson"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SlideError) as raised:
        read_outlines(path, info_of())
    message = str(raised.value)
    assert words in message
    assert " must " in message
    assert "got " in message
    assert "; " in message
    assert "wrong.geojson" in message


def test_a_class_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "c.geojson", *(feature(polygon(box(0, 0, 9, 9)), name) for name in ("Tumor", "Stroma")))
    for asked, words in (
        ("tumour", "got 'tumour'; did you mean 'Tumor'?"),
        ("Immune cells", "got 'Immune cells'; there are 'Tumor', 'Stroma'"),
    ):
        with pytest.raises(SlideError) as raised:
            read_outlines(path, info_of(), [asked])
        assert words in str(raised.value)
    plain = write(tmp_path / "plain.geojson", feature(polygon(box(0, 0, 9, 9))))
    with pytest.raises(SlideError, match="got 'Tumor'; no feature of the file has a class"):
        read_outlines(plain, info_of(), ["Tumor"])


def test_labels_are_of_images_and_classes_of_outlines(tmp_path: Path) -> None:
    path = write(tmp_path / "c.geojson", feature(polygon(box(0, 0, 9, 9)), "Tumor"))
    with pytest.raises(SlideError, match="--mask-value names labels of an image, got 3 and the outlines"):
        load_mask(path, info_of(), (3,))
    with pytest.raises(SlideError, match=r"--mask-class names classes of GeoJSON outlines, got 'Tumor' and the image"):
        load_mask(tmp_path / "mask.png", info_of(), tissue_classes=["Tumor"])


def test_a_token_takes_part_if_half_of_it_is_in_the_region_and_less_than_half_is_excluded(tmp_path: Path) -> None:
    info = info_of(160, 160)
    everywhere = TissueMask(np.ones((16, 16), bool), 10.0, (10.0, 10.0), "file", 1.0)
    roi = write(tmp_path / "roi.geojson", feature(polygon(box(0, 0, 72, 160))))
    out = write(
        tmp_path / "out.geojson",
        feature(polygon(box(0, 0, 160, 23.9)), "Pen"),
        feature(polygon(box(0, 0, 160, 160)), "x"),
    )
    limited = limit_tissue(everywhere, info, "s", (roi, None), (out, ["Pen"]))
    grid = grid_of(limited, info, tile_px=16, token_px=16)
    rows, columns = np.nonzero(grid.keep_HW)
    assert (columns.min(), columns.max()) == (0, 4)  # half of the fifth column lies in the region
    assert (rows.min(), rows.max()) == (1, 9)  # less than half of the second row is excluded
    assert limited.method == "file within roi.geojson without out.geojson"
    assert limit_tissue(everywhere, info, "s") is everywhere


def test_a_folder_has_a_file_for_each_slide(tmp_path: Path) -> None:
    info = info_of(160, 160)
    everywhere = TissueMask(np.ones((16, 16), bool), 10.0, (10.0, 10.0), "file", 1.0)
    write(tmp_path / "a.geojson", feature(polygon(box(0, 0, 80, 80))))
    assert limit_tissue(everywhere, info, "a", (tmp_path, None)).tissue_fraction == 0.25
    assert limit_tissue(everywhere, info, "b", exclude=(tmp_path, None)) is everywhere
    with pytest.raises(SlideError, match=r"must have a file for each slide, got no b\.geojson in"):
        limit_tissue(everywhere, info, "b", (tmp_path, None))


def test_a_run_looks_only_into_its_region_and_says_so(
    model: SlideModel, slide: Path, tmp_path: Path, settings: RunSettings
) -> None:
    roi = write(tmp_path / "roi.geojson", feature(polygon(box(0, 0, 256, 420)), "Region*"))
    asked = replace(settings, roi=roi, roi_classes=("Region*",), geojson="tiles")
    (outcome,) = run_slides([SlideJob("disc", slide)], model, asked)
    assert outcome.status == "ok", outcome.reason
    assert outcome.prediction.tissue["method"].endswith(" within roi.geojson")
    recorded = outcome.prediction.settings
    assert (recorded["roi"], recorded["roi_classes"]) == ("roi.geojson", ["Region*"])
    features = json.loads((settings.out_dir / "disc" / "relevance.geojson").read_text())["features"]
    assert max(shapely.geometry.shape(one["geometry"]).bounds[2] for one in features) == 256
    (again,) = run_slides([SlideJob("disc", slide)], model, asked)
    assert again.status == "skipped"
    (other,) = run_slides([SlideJob("disc", slide)], model, settings)
    assert "got roi: roi.geojson" in other.reason


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        *AREAS_WITHOUT_EFFECT,
        (
            {"exclude": Path(), "masked": False},
            "--exclude says what of the tissue takes part, got . when the model attends to the whole slide",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(
    model: SlideModel, slide: Path, settings: RunSettings, asked: dict[str, Any], words: str
) -> None:
    assert_refused(slide, model, replace(settings, **asked), words)
