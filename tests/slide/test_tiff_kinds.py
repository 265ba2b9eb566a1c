"""TIFFs that are read as slides: series, qptiff, spacing from OME-XML; and those that are refused and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from slides import write_pyramid
from tiffs import SPACING, draw, halved, write_ome

from maskattn.errors import SlideError
from maskattn.slide.formats.ome import read_ome
from maskattn.slide.reader import SlideReader

OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{}</OME>'


def image_xml(attributes: str, channel: str = '<Channel ID="C:0"/>') -> str:
    return OME.format(f'<Image Name="one"><Pixels SizeX="9" SizeY="9" {attributes}>{channel}</Pixels></Image>')


@pytest.mark.parametrize(
    ("value", "unit", "um"),
    [
        ("0.25", None, 0.25),
        ("0.25", "µm", 0.25),
        ("0.25", "μm", 0.25),  # the Greek letter
        ("250", "nm", 0.25),
        ("2500", "Å", 0.25),
        ("0.00025", "mm", 0.25),
        ("0.000025", "cm", 0.25),
        ("2.5e-7", "m", 0.25),
        ("0.00001", "in", 0.254),
        ("0.00001", "inch", 0.254),
        ("3", "pixel", None),
        ("1", "reference frame", None),
        ("0", "µm", None),
        ("-1", "µm", None),
        ("nan", "µm", None),
        ("wide", "µm", None),
    ],
)
def test_physical_sizes_are_read_in_their_units(value: str, unit: str | None, um: float | None) -> None:
    units = "" if unit is None else f'PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    (image,) = read_ome(image_xml(f'PhysicalSizeX="{value}" PhysicalSizeY="{value}" {units}'))
    assert image.spacing_um == (None if um is None else pytest.approx((um, um)))


@pytest.mark.parametrize(
    "text", [None, "", "plain", "<OME", "<OME><broken", "<!DOCTYPE x [<!ENTITY a 'b'>]><OME>&a;</OME>"]
)
def test_what_is_no_ome_xml_has_no_images(text: str | None) -> None:
    assert read_ome(text) == ()


@pytest.mark.parametrize("levels", [1, 3])
def test_ome_xml_gives_the_spacing_whichever_library_reads(tmp_path: Path, levels: int) -> None:
    said = {"PhysicalSizeX": 450, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 450, "PhysicalSizeYUnit": "nm"}
    # Bio-Formats and others leave a screen's resolution in the tags.
    tags = {"resolution": (96, 96), "resolutionunit": "INCH"}
    write_ome(tmp_path / "s.ome.tif", draw(), levels=levels, metadata=said, **tags)
    info = SlideReader(tmp_path / "s.ome.tif").info
    assert info.reader.startswith("openslide" if levels == 1 else "tifffile")
    assert info.spacing_um == pytest.approx(0.45)
    assert info.spacing_source == "metadata"


@pytest.fixture
def several(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """An OME-TIFF of a label, a slide with levels and a smaller slide of another spacing."""
    pictures = [draw(90, 80, 1), draw(1000, 700, 2), draw(500, 400, 3)]
    path = tmp_path / "several.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for number, rgb in enumerate(pictures):
            um = 0.25 * (number + 1)
            metadata = {"axes": "YXS", "Name": f"picture {number}", **SPACING, "PhysicalSizeX": um, "PhysicalSizeY": um}
            options = {"tile": (256, 256), "photometric": "rgb", "compression": "adobe_deflate"}
            writer.write(rgb, metadata=metadata, subifds=1, **options)
            writer.write(halved(rgb, 1), subfiletype=1, **options)
    return path, pictures


def test_the_largest_series_is_read_unless_another_is_asked_for(several: tuple[Path, list[np.ndarray]]) -> None:
    path, pictures = several
    for series, number in ((None, 1), (0, 0), (1, 1), (2, 2)):
        reader = SlideReader(path, series=series)
        height, width = pictures[number].shape[:2]
        assert reader.info.level_dimensions == ((width, height), (width // 2, height // 2))
        assert reader.info.spacing_um == 0.25 * (number + 1)
        whole = reader.read_region(0, 0, (width, height), (width, height))
        np.testing.assert_array_equal(whole, pictures[number])
    listed = SlideReader(path).describe()["series"]
    assert [line.split(", ")[:2] for line in listed] == [
        ["0: picture 0", "90 × 80 px"],
        ["1: picture 1", "1000 × 700 px"],
        ["2: picture 2", "500 × 400 px"],
    ]
    with pytest.raises(SlideError, match=r"series 3 of a file that has 3; give --series 0 to 2"):
        SlideReader(path, series=3)


def test_series_of_a_file_without_series_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SlideError, match="no TIFF, but asked for series 1; leave --series out"):
        SlideReader(tmp_path / "no.png", series=1)
    rgb = draw()
    write_pyramid(tmp_path / "plain.tif", rgb)
    np.testing.assert_array_equal(
        SlideReader(tmp_path / "plain.tif", series=0).read_region(0, 0, (1000, 700), (1000, 700)), rgb
    )


def write_qptiff(path: Path, planes: list[np.ndarray], rgb: bool) -> None:
    """A file as a PerkinElmer scanner writes: full resolution, a thumbnail in between, a reduced copy."""
    xml = "<?xml version='1.0'?><PerkinElmer-QPI-ImageDescription><ImageType>{}</ImageType>"
    xml += "<Objective>20x</Objective></PerkinElmer-QPI-ImageDescription>"
    with tifffile.TiffWriter(path) as writer:
        for kind, times in (("FullResolution", 0), ("Thumbnail", 2), ("ReducedResolution", 1)):
            for plane in planes:
                writer.write(
                    halved(plane, times),
                    tile=None if kind == "Thumbnail" else (256, 256),
                    rowsperstrip=64 if kind == "Thumbnail" else None,
                    photometric="rgb" if rgb else "minisblack",
                    compression="adobe_deflate",
                    description=xml.format(kind).encode(),
                    software="PerkinElmer-QPI",
                    subfiletype=int(kind != "FullResolution"),
                    resolution=(2e4 / 2**times, 2e4 / 2**times),
                    resolutionunit="CENTIMETER",
                    metadata=None,
                )
                if kind == "Thumbnail":
                    break


def test_brightfield_qptiff_is_read(tmp_path: Path) -> None:
    rgb = draw()
    write_qptiff(tmp_path / "s.qptiff", [rgb], rgb=True)
    reader = SlideReader(tmp_path / "s.qptiff")
    assert (reader.info.spacing_um, reader.info.width_px) == (0.5, 1000)
    np.testing.assert_array_equal(reader.read_region(10, 20, (600, 500), (600, 500)), rgb[20:520, 10:610])


def test_multiplex_qptiff_is_refused_and_named(tmp_path: Path) -> None:
    write_qptiff(tmp_path / "s.qptiff", [draw(seed=seed)[..., 0] for seed in range(5)], rgb=False)
    with pytest.raises(SlideError, match="fluorescence or multiplex image of 5 channels; only brightfield RGB is read"):
        SlideReader(tmp_path / "s.qptiff")


def test_fluorescence_is_refused_with_the_names_of_its_channels(tmp_path: Path) -> None:
    pixels = np.stack([draw(seed=seed)[..., 0] for seed in range(3)])
    metadata = {"axes": "CYX", **SPACING, "Channel": {"Name": ["DAPI", "CD3", "CD8"]}}
    tifffile.imwrite(tmp_path / "s.ome.tif", pixels, tile=(256, 256), photometric="minisblack", metadata=metadata)
    with pytest.raises(SlideError, match=r"multiplex image of 3 channels \(DAPI, CD3, CD8\)"):
        SlideReader(tmp_path / "s.ome.tif")


@pytest.mark.parametrize("names", [["Red", "Green", "Blue"], ["B", "G", "R"]])
def test_pages_named_for_colours_are_put_in_their_order(tmp_path: Path, names: list[str]) -> None:
    rgb = draw()
    order = ["RGB".index(name[0]) for name in names]
    metadata = {"axes": "CYX", **SPACING, "Channel": {"Name": names}}
    pixels = rgb.transpose(2, 0, 1)[order]
    tifffile.imwrite(tmp_path / "s.ome.tif", pixels, tile=(256, 256), photometric="minisblack", metadata=metadata)
    region = SlideReader(tmp_path / "s.ome.tif").read_region(0, 0, (1000, 700), (1000, 700))
    np.testing.assert_array_equal(region, rgb)


def write_tiff(path: Path, pixels: np.ndarray, **options: Any) -> None:
    tifffile.imwrite(path, pixels, **{"tile": (256, 256), "photometric": "rgb", "metadata": None, **options})


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (draw() / np.float32(255), {}, "an image of 32-bit floating-point samples; the file is not damaged: scale"),
        (draw().astype(np.uint32), {}, "an image of 32-bit integer samples"),
        (draw().astype(np.int16), {}, "an image of 16-bit signed integer samples"),
        (draw() / np.float64(255), {"planarconfig": "separate"}, "an image of 64-bit floating-point samples"),
        (draw() > 99, {"photometric": "minisblack", "tile": None}, "an image of 1-bit integer samples"),
    ],
)
def test_unsupported_samples_are_named(tmp_path: Path, pixels: np.ndarray, options: dict, reason: str) -> None:
    pixels = pixels.transpose(2, 0, 1) if "planarconfig" in options else pixels
    pixels = pixels[..., 0] if options.get("photometric") == "minisblack" else pixels
    write_tiff(tmp_path / "s.tif", pixels, **options)
    with pytest.raises(SlideError, match=reason) as raised:
        SlideReader(tmp_path / "s.tif", 0.5).thumbnail(100)
    assert "is damaged" not in str(raised.value)


@pytest.mark.parametrize("compression", ["adobe_deflate", "jpeg"])
def test_cmyk_is_read_in_tiles_and_named_in_strips(tmp_path: Path, compression: str) -> None:
    pixels = np.concatenate([255 - draw(), np.zeros((700, 1000, 1), np.uint8)], axis=2)
    write_tiff(tmp_path / "s.tif", pixels, photometric="separated", compression=compression)
    seen = SlideReader(tmp_path / "s.tif", 0.5).thumbnail(1000)
    assert np.abs(seen.astype(int) - draw()).mean() < 1
    write_tiff(tmp_path / "s.tif", pixels, photometric="separated", compression=compression, tile=None)
    with pytest.raises(SlideError, match="an image of CMYK samples; convert it to a tiled pyramid of 8-bit RGB"):
        SlideReader(tmp_path / "s.tif", 0.5)


def test_a_stack_of_focal_planes_is_named(tmp_path: Path) -> None:
    pixels = np.stack([draw(seed=seed) for seed in range(3)])
    metadata = {"axes": "ZYXS", **SPACING}
    tifffile.imwrite(tmp_path / "s.ome.tif", pixels, tile=(256, 256), photometric="rgb", metadata=metadata)
    with pytest.raises(SlideError, match="a stack of 3 focal planes; export one of them"):
        SlideReader(tmp_path / "s.ome.tif", series=0)


def test_one_strip_of_the_complete_slide_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    pixels = np.zeros((9000, 9000, 3), np.uint8)
    write_tiff(tmp_path / "s.tif", pixels, tile=None, rowsperstrip=9000, compression="zstd")
    with pytest.raises(
        SlideError, match="in tiles or strips of 9000 × 9000 px, too large to decode; convert it to a tiled"
    ):
        SlideReader(tmp_path / "s.tif", 0.5)
