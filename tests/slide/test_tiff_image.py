"""TIFFs that tifffile decodes: their contents are those that OpenSlide shows, and as little as possible is decoded."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from slides import damage_tile
from tiffs import blank_tile, draw, halved, write_ome

import maskattn.slide.formats.tiff_segments as tiff_segments
from maskattn.errors import SlideError
from maskattn.slide.formats.openslide_image import OpenSlideImage
from maskattn.slide.formats.tiff_image import TiffImage
from maskattn.slide.reader import SlideReader


@pytest.mark.parametrize("layout", ["chunky", "planar", "pages"])
@pytest.mark.parametrize("compression", [None, "adobe_deflate", "lzw", "zstd", "packbits"])
def test_every_level_of_an_ome_pyramid_is_read_pixel_for_pixel(
    tmp_path: Path, layout: str, compression: str | None
) -> None:
    levels = write_ome(tmp_path / "s.ome.tif", draw(), layout, compression=compression)
    with SlideReader(tmp_path / "s.ome.tif") as reader:
        info = reader.info
        assert info.reader.startswith("tifffile ")
        assert (info.vendor, info.spacing_um, info.spacing_source) == ("ome-tiff", 0.5, "metadata")
        assert info.level_dimensions == ((1000, 700), (500, 350), (250, 175))
        for level in levels:
            size = level.shape[1], level.shape[0]
            np.testing.assert_array_equal(reader.read_region(0, 0, (1000, 700), size), level)
        np.testing.assert_array_equal(reader.read_region(203, 311, (400, 377), (400, 377)), levels[0][311:688, 203:603])


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
def test_levels_compressed_with_loss_look_the_same(tmp_path: Path, compression: str) -> None:
    levels = write_ome(tmp_path / "s.ome.tif", cv2.blur(draw(), (31, 31)), compression=compression)
    with SlideReader(tmp_path / "s.ome.tif") as reader:
        for level in levels:
            size = level.shape[1], level.shape[0]
            off = np.abs(reader.read_region(0, 0, (1000, 700), size).astype(int) - level)
            assert off.mean() < 3


@pytest.mark.parametrize(
    ("compression", "photometric"), [("adobe_deflate", "rgb"), ("lzw", "rgb"), ("jpeg", "rgb"), ("jpeg", "ycbcr")]
)
def test_what_it_reads_is_what_openslide_reads(tmp_path: Path, compression: str, photometric: str) -> None:
    path = tmp_path / "s.tif"
    with tifffile.TiffWriter(path) as writer:
        for times in range(3):
            kind = {"subfiletype": int(times > 0), "photometric": photometric, "compression": compression}
            writer.write(halved(draw(1112, 776), times), tile=(128, 240), metadata=None, **kind)
    ours, theirs = TiffImage(path), OpenSlideImage(path)
    assert ours.level_dimensions == theirs.level_dimensions
    assert ours.level_downsamples == theirs.level_downsamples
    rng = np.random.default_rng(0)
    for level, (width, height) in enumerate(ours.level_dimensions):
        for x, y in [(0, 0), (width - 130, height - 60), *rng.integers(0, (width - 130, height - 60), (6, 2)).tolist()]:
            mine, other = ours.read(level, x, y, 130, 60), theirs.read(level, x, y, 130, 60)[..., :3]
            np.testing.assert_array_equal(mine, other)


def test_only_the_tiles_below_the_region_are_decoded(tmp_path: Path) -> None:
    rgb = draw(1024, 768)
    write_ome(tmp_path / "s.ome.tif", rgb)
    for tile in range(12):
        if tile not in (5, 6):
            damage_tile(tmp_path / "s.ome.tif", tile)
    reader = SlideReader(tmp_path / "s.ome.tif")
    np.testing.assert_array_equal(reader.read_region(256, 256, (512, 256), (512, 256)), rgb[256:512, 256:768])
    with pytest.raises(SlideError, match=r"got x=768, y=256 at level 0 of .*; the file is damaged there"):
        reader.read_region(256, 256, (513, 256), (513, 256))


@pytest.mark.parametrize("cache_bytes", [0, 300_000, 1 << 30])
def test_the_cache_is_bounded_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    rgb = draw()
    write_ome(tmp_path / "s.ome.tif", rgb, "planar")
    monkeypatch.setattr(tiff_segments, "_CACHE_BYTES", cache_bytes)
    image = TiffImage(tmp_path / "s.ome.tif")
    for _ in range(2):
        for y in range(0, 640, 64):
            np.testing.assert_array_equal(image.read(0, 10, y, 900, 60), rgb[y : y + 60, 10:910])
    held = [segment.nbytes for segment in image._segments._held.values()]
    assert sum(held) == image._segments._bytes <= max(cache_bytes, 256 * 256)
    assert len(held) == {0: 1, 300_000: 4, 1 << 30: 36}[cache_bytes]


def read_corner(reader: SlideReader) -> np.ndarray:
    return reader.read_region(100, 50, (300, 300), (300, 300))


def test_a_reader_reads_the_same_in_a_spawned_process(tmp_path: Path) -> None:
    write_ome(tmp_path / "s.ome.tif", draw())
    reader = SlideReader(tmp_path / "s.ome.tif")
    expected = read_corner(reader)
    np.testing.assert_array_equal(read_corner(pickle.loads(pickle.dumps(reader))), expected)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(read_corner, (reader,)), expected)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_opens_the_file_for_itself(tmp_path: Path) -> None:
    write_ome(tmp_path / "s.ome.tif", draw())
    reader = SlideReader(tmp_path / "s.ome.tif")
    expected, parents = read_corner(reader), reader._image
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def read_in_child() -> None:
        # A shared file would have a shared offset: a seek of one process would move the other's reads.
        answers.put((np.array_equal(read_corner(reader), expected), reader._image is parents))

    child = context.Process(target=read_in_child)
    child.start()
    assert answers.get(timeout=60) == (True, False)
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(read_corner(reader), expected)
    assert reader._image is parents


def test_tiles_that_were_never_written_are_white(tmp_path: Path) -> None:
    rgb = draw(1024, 768)
    write_ome(tmp_path / "s.ome.tif", rgb)
    blank_tile(tmp_path / "s.ome.tif", 1)
    region = SlideReader(tmp_path / "s.ome.tif").read_region(0, 0, (1024, 768), (1024, 768))
    assert (region[:256, 256:512] == 255).all()
    region[:256, 256:512] = rgb[:256, 256:512]
    np.testing.assert_array_equal(region, rgb)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_transparent_pixels_lie_on_white(tmp_path: Path, kind: str) -> None:
    rgba = np.full((300, 300, 4), 255, np.uint8)
    rgba[..., :3] = (200, 100, 0)
    rgba[:100, :, 3] = 0
    rgba[100:200, :, 3] = 51
    drawn = rgba.copy()
    if kind == "assocalpha":
        drawn[..., :3] = np.rint(rgba[..., :3].astype(float) * rgba[..., 3:] / 255)
    write_ome(tmp_path / "s.ome.tif", drawn, levels=2, extrasamples=[kind])
    region = SlideReader(tmp_path / "s.ome.tif").read_region(0, 0, (300, 300), (300, 300)).astype(int)
    for row, colour in ((50, (255, 255, 255)), (150, (244, 224, 204)), (250, (200, 100, 0))):
        assert np.abs(region[row] - colour).max() <= 2


@pytest.mark.parametrize("layout", ["chunky", "planar"])
@pytest.mark.parametrize("bits", [None, 12])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, layout: str, bits: int | None) -> None:
    rgb = draw()
    white = (1 << (bits or 16)) - 1
    wide = np.rint(rgb.astype(float) * white / 255).astype(np.uint16)
    metadata = {} if bits is None else {"SignificantBits": bits}
    write_ome(tmp_path / "s.ome.tif", wide, layout, metadata=metadata)
    np.testing.assert_array_equal(
        SlideReader(tmp_path / "s.ome.tif").read_region(5, 6, (500, 400), (500, 400)), rgb[6:406, 5:505]
    )


@pytest.mark.parametrize("layout", ["chunky", "planar"])
@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_strips_are_read(
    tmp_path: Path, layout: str, compression: str | None, dtype: type[np.generic], byteorder: str
) -> None:
    rgb = draw(611, 407)
    pixels = rgb.astype(dtype) * (257 if dtype is np.uint16 else 1)
    options = {"planarconfig": "separate"} if layout == "planar" else {}
    tifffile.imwrite(
        tmp_path / "s.tif",
        pixels.transpose(2, 0, 1) if layout == "planar" else pixels,
        photometric="rgb",
        compression=compression,
        rowsperstrip=407 if compression is None else 16,
        byteorder=byteorder,
        metadata=None,
        **options,
    )
    reader = SlideReader(tmp_path / "s.tif", 0.5)
    np.testing.assert_array_equal(reader.read_region(101, 53, (500, 354), (500, 354)), rgb[53:, 101:601])
    assert reader.describe()["reader"].startswith("tifffile")


def test_reduced_pages_of_the_main_chain_are_levels(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        for times in range(3):
            own = {"subfiletype": int(times > 0), "photometric": "rgb"}
            writer.write(halved(draw(), times), rowsperstrip=32, compression="lzw", metadata=None, **own)
        writer.write(draw(90, 80), photometric="rgb", metadata=None)  # a label: another picture
    reader = SlideReader(tmp_path / "s.tif", 0.5)
    assert reader.info.level_dimensions == ((1000, 700), (500, 350), (250, 175))


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
def test_a_tile_that_states_a_huge_size_is_damage_and_not_decoded(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "s.ome.tif"
    write_ome(path, draw(), compression=compression)
    data = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        start = file.pages.first.dataoffsets[0]
    if compression == "jpeg":
        place, huge = data.index(b"\xff\xc0", start) + 5, b"\xff\xf0\xff\xf0"
    else:
        place, huge = data.index(b"\xff\x51", start) + 6, b"\x00\x00\xff\xf0\x00\x00\xff\xf0"
    path.write_bytes(data[:place] + huge + data[place + len(huge) :])
    reader = SlideReader(path)
    with pytest.raises(SlideError, match=r"got x=0, y=0 at level 0 .* states a size of 65520 x 65520"):
        reader.read_region(0, 0, (300, 300), (300, 300))
    assert reader.read_region(256, 0, (256, 256), (256, 256)).min() < 255


def test_a_tiff_cut_short_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "s.ome.tif"
    write_ome(path, draw(2000, 1500), compression=None)
    with tifffile.TiffFile(path) as file:
        end = file.pages.first.dataoffsets[-1] + 1000
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(SlideError):  # its levels are gone, or its directory is
        SlideReader(path).read_region(0, 0, (2000, 1500), (2000, 1500))
