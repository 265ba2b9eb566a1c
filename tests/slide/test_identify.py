"""A file that is not a slide, or is of an unsupported kind, is identified, and the remedy fits."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import cv2
import pytest
from fuzz_sources import baseline_jpeg, dicom_instance
from slides import damage_tile, make_slide
from tiffs import draw

from maskattn.errors import SlideError
from maskattn.slide.formats.remedies import remedy_for
from maskattn.slide.reader import SlideReader


def write_dicom(path: Path, spacing_mm: float, **meta: str) -> None:
    """A DICOM slide of one level, 128 × 64 px, with some of its file meta information replaced."""
    image = dicom_instance(draw(128, 64), 0, 1, "VOLUME", baseline_jpeg, False)
    for name, value in meta.items():
        setattr(image.file_meta, name, value)
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID
    image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [spacing_mm] * 2
    image.save_as(path, enforce_file_format=True)


def refusal_of(path: Path, **how: float) -> str:
    with pytest.raises(SlideError) as raised:
        SlideReader(path, **how).thumbnail(16)
    message = str(raised.value)
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "what", "remedy"),
    [
        ("a.svs", b"", "an empty file", "copy it again"),
        ("a.svs", bytes(5000), "begins with zeros", "copy it again"),
        ("a.svs", b"<!DOCTYPE html><html><title>Sign in</title>", "a web page", "download the slide again"),
        ("a.svs", b"\n <html lang='de'>", "a web page", "download the slide again"),
        ("a.tif", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer", "git lfs pull"),
        ("a.svs", b'{"message": "Not Found"}', 'a text file that begins with \'{"message"', "download it again"),
        ("a.svs", b"\x1f\x8b\x08\x00rest", "a gzip archive", "unpack it"),
        ("a.ndpi", b"%PDF-1.7 rest", "a PDF document", "name the slide file itself"),
        ("a.h5", b"\x89HDF\r\n\x1a\nrest", "an HDF5 file", "name the slide file itself"),
        ("a.nd2", b"\xda\xce\xbe\x0arest", "a Nikon ND2 file", "export it as OME-TIFF"),
        ("a.zvi", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1rest", "an OLE file, such as Zeiss ZVI", "export it as OME-TIFF"),
        ("a.tif", b"II*\x00\x00\x10\x00\x00" + bytes(100), "a TIFF that is cut short", "copy it again to its end"),
        ("a.tif", b"II+\x00\x08\x00\x00\x00" + struct.pack("<Q", 1 << 40), "a TIFF that is cut short", "copy it again"),
        ("a.svs", b"MM\x00*", "a TIFF that is cut short", "copy it again"),
        ("a.mrxs", b"\xff\xd8\xff\xe0rest", "a MIRAX slide, whose folder is missing", "folder 'a' must be next to it"),
        ("a.dat", bytes(range(1, 200)), "a format that neither knows", "convert it to a tiled pyramidal TIFF"),
    ],
)
def test_a_file_is_named_by_its_bytes(tmp_path: Path, name: str, content: bytes, what: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal_of(tmp_path / name)
    assert what in message
    assert remedy in message.rsplit("; ", 1)[1]
    assert "is damaged" not in message


@pytest.mark.parametrize(
    ("suffix", "name"), [(".jpg", "JPEG"), (".png", "PNG"), (".bmp", "BMP"), (".jp2", "JPEG 2000")]
)
def test_a_plain_image_is_to_be_converted_and_given_a_spacing(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"picture{suffix}"
    assert cv2.imwrite(str(path), draw(60, 50))
    message = refusal_of(path)
    assert f"{name} image" in message
    assert "vips tiffsave" in message
    assert "`--spacing-um`" in message


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "slide.svs", "w") as archive:
        archive.writestr("slide.svs", "x")
    assert "a ZIP archive; unpack it and name the slide in it" in refusal_of(tmp_path / "slide.svs")


@pytest.mark.parametrize(
    ("inside", "what"),
    [(".zattrs", "a Zarr store"), ("zarr.json", "a Zarr store"), ("Slidedat.ini", "name the file next to it: it.mrxs"),
     ("1.dcm", "a folder of DICOM files; name one of the full-resolution"), ("x", "a folder; check the path")],
)  # fmt: skip
def test_a_folder_is_identified_by_its_contents(tmp_path: Path, inside: str, what: str) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / inside).touch()
    assert what in refusal_of(tmp_path / "it")


def test_a_mirax_folder_without_its_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mrxs").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "a").mkdir()
    assert "whose folder lacks a/Slidedat.ini; copy the folder again" in refusal_of(tmp_path / "a.mrxs")


def czi(pieces: list[dict[str, tuple[int, int]]]) -> bytes:
    """The head and the directory of a CZI; each piece says (start, size) along its dimensions."""
    entries = b""
    for piece in pieces:
        entries += b"DV" + struct.pack("<iqiiB5xi", 3, 0, 0, 0, 0, len(piece))
        for axis, (start, size) in piece.items():
            entries += struct.pack("<4siifi", axis.encode(), start, size, 0.0, size)
    head = b"ZISRAWFILE".ljust(16, b"\0") + struct.pack("<qq", 80, 80) + bytes(52) + struct.pack("<qq", 144, 0)
    directory = b"ZISRAWDIRECTORY".ljust(16, b"\0") + struct.pack("<qqi", 0, 0, len(pieces)) + bytes(124)
    return head.ljust(144, b"\0") + directory + entries


def test_a_czi_is_named_with_its_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "a.czi"
    path.write_bytes(
        czi([{"X": (x, 1000), "Y": (-300, 2000), "C": (c, 1), "S": (0, 1)} for x in (500, 1500) for c in range(4)])
    )
    message = refusal_of(path)
    assert "a Zeiss CZI of 2000 × 2000 px, 4 channels" in message
    assert "not every CZI is read: export this one as OME-TIFF" in message
    path.write_bytes(b"ZISRAWFILE" + bytes(100))
    assert "which is a Zeiss CZI" in refusal_of(path)


def test_unsupported_dicom_is_named_with_its_transfer_syntax(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    write_dicom(path, 0.0005, TransferSyntaxUID="1.2.840.10008.1.2.4.80")
    message = refusal_of(path)
    assert "transfer syntax that is not read (JPEG-LS lossless, 1.2.840.10008.1.2.4.80)" in message
    assert "transcode it to one that is: uncompressed, JPEG and JPEG 2000" in message


def test_dicom_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    write_dicom(path, 0.0005, MediaStorageSOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    assert "a DICOM file of another kind (SOP class 1.2.840.10008.5.1.4.1.1.2)" in refusal_of(path)


def test_an_overview_given_as_the_slide_is_named_with_its_spacing_and_size(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", 0.029)
    message = refusal_of_info(tmp_path / "a.dcm")
    assert "29, 29 (µm)" in message
    assert "this is an overview of 128 × 64 px: give the file of the full-resolution level" in message
    assert "--spacing-um 0.5" not in message


@pytest.mark.parametrize(
    ("spacing_um", "said", "unsaid"),
    [
        (25_400 / 96, "96 dots per inch is a screen's or a printer's resolution", "overview"),
        (25_400 / 72, "72 dots per inch", "overview"),
        (28.7, "this is an overview of 64 × 48 px: give the file of the full-resolution level", "0.5"),
        (120.0, "this is an overview", "0.5"),
        (0.004, "if that is wrong, give the slide's own spacing", "0.5`"),
    ],
)
def test_a_spacing_out_of_range_gets_the_remedy_that_fits(
    tmp_path: Path, spacing_um: float, said: str, unsaid: str
) -> None:
    slide = make_slide(tmp_path / "s.tif", 64, 48, spacing_um, downsamples=())
    message = refusal_of_info(slide.path)
    assert said in message
    assert unsaid not in message.split("got only")[1].split("metadata of")[1].replace(str(tmp_path), "")


def refusal_of_info(path: Path) -> str:
    with pytest.raises(SlideError) as raised:
        _ = SlideReader(path).info
    return str(raised.value)


def test_a_missing_file_of_the_slide_is_not_called_damage(tmp_path: Path) -> None:
    assert "a file of the slide is missing" in remedy_for(
        "Couldn't open /data/a/Data0006.dat: No such file or directory"
    )
    assert "not damaged" in remedy_for("Sorry, can not handle images with 32-bit samples")
    assert "check the disk" in remedy_for("Input/output error")
    slide = make_slide(tmp_path / "s.tif", 300, 300, downsamples=())
    damage_tile(slide.path, 0)
    with pytest.raises(SlideError, match="the file is damaged there: copy it again"):
        SlideReader(slide.path).read_region(0, 0, (20, 20), (20, 20))


@pytest.mark.parametrize(
    ("name", "head", "missing"),
    [
        ("a.vms", "[Virtual Microscope Specimen]\nNoJpegColumns=1\nNoJpegRows=1\nOptimisationFile=a.opt", "a_map.jpg"),
        ("a.vmu", "[Uncompressed Virtual Microscope Specimen]\nBitsPerPixel=36\nPixelOrder=RGB", "a_map.ngr"),
    ],
)
def test_a_slide_of_several_files_names_the_one_that_is_missing(
    tmp_path: Path, name: str, head: str, missing: str
) -> None:
    image = missing.replace("map", "0")
    (tmp_path / name).write_text(f"{head}\nNoLayers=1\nImageFile={image}\nMapFile={missing}\n")
    message = refusal_of(tmp_path / name)
    assert f"Couldn't open {tmp_path / missing}" in message
    assert message.endswith("a file of the slide is missing: copy the slide again with all its files and folders")
