"""Slides to be damaged: small ones of every layout that users bring, drawn here, and real ones that are given.

Dimension key: (H, W) pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage
from slides import draw_tissue

KINDS = ("TIFF", "SVS", "DICOM")
SIZE = (448, 320)
TILE = 64
SPACING_UM = 1.0


@dataclass(frozen=True)
class Source:
    """A slide: the file that is opened, and the files next to it that belong to it."""

    kind: str
    name: str
    path: Path
    beside: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path, *self.beside)


def draw_sources(folder: Path) -> list[Source]:
    """Write one slide of each layout to a folder of its own; the same bytes every time."""
    rgb, _ = draw_tissue(*SIZE)
    sources = []
    for name, draw in DRAWINGS.items():
        kind = name.split()[0]
        place = folder / name.replace(" ", "_").replace(",", "")
        place.mkdir(parents=True, exist_ok=True)
        path, *beside = draw(place, rgb)
        sources.append(Source(kind, name, path, tuple(beside)))
    return sources


def given_sources(paths: list[Path]) -> list[Source]:
    """Real slides, one file each; of a folder those files that are slides by their names."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    kinds = {".svs": "SVS", ".dcm": "DICOM", ".tif": "TIFF", ".tiff": "TIFF"}
    return [
        Source(kinds[file.suffix.lower()], f"{kinds[file.suffix.lower()]} given, {file.name}", file)
        for file in files
        if file.suffix.lower() in kinds and file.stat().st_size
    ]


def shrunk(rgb: np.ndarray, downsample: int) -> np.ndarray:
    size = (rgb.shape[1] // downsample, rgb.shape[0] // downsample)
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def resolution(downsample: int) -> dict[str, Any]:
    return {"resolution": (1e4 / (SPACING_UM * downsample),) * 2, "resolutionunit": "CENTIMETER"}


def tiff(of: Callable[[np.ndarray], np.ndarray] = np.asarray, **how: Any) -> Callable[[Path, np.ndarray], list[Path]]:
    """Draws a tiled pyramid of two levels; ``of`` turns RGB into what is stored, ``how`` is tifffile's."""
    file = {name: how.pop(name) for name in ("bigtiff", "byteorder") if name in how}
    how = {"photometric": "rgb", "tile": (TILE, TILE), "metadata": None} | how

    def draw(folder: Path, rgb: np.ndarray) -> list[Path]:
        path = folder / "slide.tiff"
        with tifffile.TiffWriter(path, **file) as writer:
            for downsample in (1, 4):
                level = of(rgb if downsample == 1 else shrunk(rgb, downsample))
                writer.write(level, subfiletype=int(downsample > 1), **resolution(downsample), **how)
        return [path]

    return draw


def ome_tiff(folder: Path, rgb: np.ndarray) -> list[Path]:
    """An OME-TIFF: its smaller level is a SubIFD, and XML gives its spacing."""
    path = folder / "slide.ome.tiff"
    metadata = {"axes": "YXS", "PhysicalSizeX": SPACING_UM, "PhysicalSizeXUnit": "µm"}
    metadata |= {"PhysicalSizeY": SPACING_UM, "PhysicalSizeYUnit": "µm", "UUID": "urn:uuid:" + "0" * 32}
    with tifffile.TiffWriter(path, ome=True) as writer:
        how: dict[str, Any] = {"photometric": "rgb", "tile": (TILE, TILE), "compression": "zlib"}
        writer.write(rgb, subifds=1, metadata=metadata, **resolution(1), **how)
        writer.write(shrunk(rgb, 4), subfiletype=1, **resolution(4), **how)
    return [path]


def philips_tiff(folder: Path, rgb: np.ndarray) -> list[Path]:
    """A pyramid as Philips writes it: levels are padded to whole tiles, and all that is known of it is XML."""

    def attribute(name: str, group: str, element: str, kind: str, value: str) -> str:
        return f'<Attribute Name="{name}" Group="0x{group}" Element="0x{element}" PMSVR="{kind}">{value}</Attribute>'

    def thing(kind: str, content: str) -> str:
        return f'<DataObject ObjectType="{kind}">{content}</DataObject>'

    spacings = [
        attribute("DICOM_PIXEL_SPACING", "0028", "0030", "IDoubleArray", f'"{mm:.6f}" "{mm:.6f}"')
        for mm in (SPACING_UM / 1000, SPACING_UM / 250)
    ]
    levels = "".join(thing("PixelDataRepresentation", spacing) for spacing in spacings)
    image = attribute("PIM_DP_IMAGE_TYPE", "301D", "1004", "IString", "WSI") + spacings[0]
    image += attribute(
        "PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", "1001", "8B01", "IDataObjectArray", f"<Array>{levels}</Array>"
    )
    images = f"<Array>{thing('DPScannedImage', image)}</Array>"
    text = '<?xml version="1.0" encoding="UTF-8" ?>' + thing(
        "DPUfsImport", attribute("PIM_DP_SCANNED_IMAGES", "301D", "1003", "IDataObjectArray", images)
    )
    path = folder / "slide.tiff"
    with tifffile.TiffWriter(path) as writer:
        for downsample in (1, 4):
            level = rgb if downsample == 1 else shrunk(rgb, downsample)
            about = {"description": text, "software": "Philips DP v1.0"} if downsample == 1 else {"software": False}
            how = {"photometric": "rgb", "tile": (TILE, TILE), "compression": "jpeg", "metadata": None}
            writer.write(level, subfiletype=int(downsample > 1), **how, **about)
    return [path]


def svs(compression: str) -> Callable[[Path, np.ndarray], list[Path]]:
    """Draws a slide as Aperio writes it: levels, a thumbnail in strips between them, a label and a macro image."""

    def draw(folder: Path, rgb: np.ndarray) -> list[Path]:
        path = folder / "slide.svs"
        width, height = SIZE
        about = f"Aperio Image Library v11.2.1\r\n{width}x{height} [0,0 {width}x{height}] ({TILE}x{TILE}) JPEG/RGB Q=30"
        about += f"|AppMag = 20|StripeWidth = 2040|ScanScope ID = CPAPERIOCS|MPP = {SPACING_UM}|Left = 25.6|Top = 23.4"
        small = shrunk(rgb, 4)
        how: dict[str, Any] = {"photometric": "rgb", "metadata": None, "software": False}
        tiled = {"tile": (TILE, TILE), "compression": compression}
        strips = {"rowsperstrip": 16, "compression": "jpeg"}
        with tifffile.TiffWriter(path) as writer:
            writer.write(rgb, description=about, **tiled, **how)
            writer.write(small, description=f"{about} -> thumbnail", **strips, **how)
            writer.write(small, description=about, **tiled, **how)
            writer.write(small, description="Aperio Image Library\r\nlabel 112x80", **strips, subfiletype=1, **how)
            writer.write(small, description="Aperio Image Library\r\nmacro 112x80", **strips, subfiletype=9, **how)
        return [path]

    return draw


def dicom(encode: Callable[[np.ndarray], bytes] | None, sparse: bool) -> Callable[[Path, np.ndarray], list[Path]]:
    """Draws a DICOM slide: a file per level, and a label; ``encode`` compresses a tile, None stores it as it is."""

    def draw(folder: Path, rgb: np.ndarray) -> list[Path]:
        paths = []
        for number, (downsample, flavour) in enumerate(((1, "VOLUME"), (4, "VOLUME"), (4, "LABEL"))):
            level = rgb if downsample == 1 else shrunk(rgb, downsample)
            paths.append(folder / f"level_{number}.dcm")
            instance = dicom_instance(level, number, downsample, flavour, encode, sparse)
            instance.save_as(paths[-1], enforce_file_format=True)
        return paths

    return draw


def dicom_instance(
    rgb: np.ndarray,
    number: int,
    downsample: int,
    flavour: str,
    encode: Callable[[np.ndarray], bytes] | None,
    sparse: bool,
) -> Dataset:
    """One image of a slide, in the terms of PS3.3 A.32.8."""
    height, width = rgb.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = cv2.copyMakeBorder(
        rgb, 0, rows * TILE - height, 0, columns * TILE - width, cv2.BORDER_CONSTANT, value=(255, 255, 255)
    )
    tiles = padded.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = f"1.2.826.0.1.3680043.8.498.1.{number + 1}"
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if encode is None else JPEGBaseline8Bit
    image.SeriesInstanceUID, image.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.2", "1.2.826.0.1.3680043.8.498.3"
    image.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.4"
    image.Modality, image.PatientID, image.PatientName, image.Manufacturer = "SM", "0", "Drawn^Slide", "maskattn"
    image.ImageType = ["ORIGINAL" if downsample == 1 else "DERIVED", "PRIMARY", flavour, "NONE"]
    if downsample > 1 and flavour == "VOLUME":
        image.ImageType[3] = "RESAMPLED"
    image.Rows = image.Columns = TILE
    image.TotalPixelMatrixColumns, image.TotalPixelMatrixRows, image.TotalPixelMatrixFocalPlanes = width, height, 1
    image.SamplesPerPixel, image.PlanarConfiguration, image.PixelRepresentation = 3, 0, 0
    image.PhotometricInterpretation = "RGB" if encode is None else "YBR_FULL_422"
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    image.NumberOfFrames, image.NumberOfOpticalPaths = len(tiles), 1
    image.DimensionOrganizationType = "TILED_SPARSE" if sparse else "TILED_FULL"
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = [SPACING_UM * downsample / 1000] * 2, 0.004
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    image.SharedFunctionalGroupsSequence = [shared]
    path = Dataset()
    path.OpticalPathIdentifier, path.ObjectiveLensPower = "0", 20
    image.OpticalPathSequence = [path]
    if sparse:
        image.PerFrameFunctionalGroupsSequence = [dicom_place(frame, columns) for frame in range(len(tiles))]
    frames = [tile.tobytes() if encode is None else encode(tile) for tile in tiles]
    image.PixelData = b"".join(frames) if encode is None else encapsulate(frames)
    image["PixelData"].VR = "OB"
    return image


def dicom_place(frame: int, columns: int) -> Dataset:
    """Where a frame lies in the image, for images that list it."""
    position = Dataset()
    position.ColumnPositionInTotalImagePixelMatrix = frame % columns * TILE + 1
    position.RowPositionInTotalImagePixelMatrix = frame // columns * TILE + 1
    groups = Dataset()
    groups.PlanePositionSlideSequence = [position]
    return groups


def baseline_jpeg(tile: np.ndarray) -> bytes:
    encoded: bytes = imagecodecs.jpeg8_encode(tile, level=80, subsampling="422")
    return encoded


def with_black(rgb: np.ndarray) -> np.ndarray:
    return np.concatenate([255 - rgb, np.zeros_like(rgb[..., :1])], axis=2)


def in_16_bits(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.uint16) * 257


def planes(rgb: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rgb.transpose(2, 0, 1))


DRAWINGS: dict[str, Callable[[Path, np.ndarray], list[Path]]] = {
    "TIFF deflate": tiff(compression="zlib"),
    "TIFF deflate, predictor": tiff(compression="zlib", predictor=True, bigtiff=True),
    "TIFF JPEG": tiff(compression="jpeg"),
    "TIFF LZW": tiff(compression="lzw"),
    "TIFF deflate, big endian": tiff(compression="zlib", byteorder=">"),
    "TIFF JPEG 2000": tiff(compression="jpeg2000"),
    "TIFF planar": tiff(planes, planarconfig="separate", compression="zlib"),
    "TIFF 16 bit": tiff(in_16_bits, compression="zlib"),
    "TIFF 16 bit, planar": tiff(lambda rgb: planes(in_16_bits(rgb)), planarconfig="separate"),
    "TIFF CMYK JPEG": tiff(with_black, photometric="separated", compression="jpeg"),
    "TIFF OME": ome_tiff,
    "TIFF Philips": philips_tiff,
    "SVS JPEG": svs("jpeg"),
    "SVS JPEG 2000": svs("aperio_jp2000_rgb"),
    "DICOM JPEG": dicom(baseline_jpeg, sparse=False),
    "DICOM JPEG, sparse": dicom(baseline_jpeg, sparse=True),
    "DICOM uncompressed": dicom(None, sparse=False),
}
