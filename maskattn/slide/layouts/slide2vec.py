"""slide2vec's layout.

``ROOT/tile_embeddings/<id>.pt`` is one tensor (T, C) of float32 or float16, next to ``<id>.meta.json``;
``ROOT/tiles/<id>.coordinates.npz`` and ``.meta.json`` are hs2p's coordinates, in the order of the tensor: by x, then y.
Instead of the tensor there may be ``<id>.npz`` with ``features``. Source: version 5.7.0 (clemsgrs/slide2vec:
``slide2vec/artifacts.py``, ``slide2vec/runtime/embedding.py``, ``docs/output-layout.rst``).

This package adds the key ``token_mask`` to ``.meta.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskattn.errors import SlideError
from maskattn.files import replacing
from maskattn.slide.layouts import hs2p
from maskattn.slide.layouts.checks import features_of
from maskattn.slide.layouts.contents import FileContents, reading
from maskattn.slide.layouts.hs2p import META_ENDING, NPZ_ENDING
from maskattn.slide.layouts.layout import TakeTiles, writable_id
from maskattn.slide.layouts.tensor_files import TensorSpool, read_tensor
from maskattn.slide.layouts.tile_features import TileCoords, TileFeatures, TileHeader
from maskattn.slide.layouts.trident import token_mask_of
from maskattn.slide.names import as_text

if TYPE_CHECKING:
    from maskattn.slide.reader import SlideInfo

__all__ = ["Slide2Vec", "meta_of", "read_meta"]


class Slide2Vec:
    """slide2vec: features as tensors, coordinates of hs2p."""

    name = "slide2vec"
    feature_patterns = ("tile_embeddings/{id}.pt", "tile_embeddings/{id}.npz", "{id}.pt", "{id}.npz")
    coords_patterns = (f"tiles/{{id}}{NPZ_ENDING}", f"{{id}}{NPZ_ENDING}")

    def has_features(self, contents: FileContents) -> bool:
        """Return whether it is a tensor with ``.meta.json`` or in ``tile_embeddings``, or an archive of features."""
        if contents.kind == "pt":
            return meta_of(contents.path).is_file() or contents.path.parent.name == "tile_embeddings"
        return contents.kind == "npz" and "features" in contents.names

    def has_coords(self, contents: FileContents) -> bool:
        """Return whether the file is an archive of hs2p's coordinates."""
        return hs2p.is_hs2p(contents)

    def read_features(self, path: Path, slide: SlideInfo | None, encoder: str | None) -> TileFeatures:
        """Read ``tile_embeddings/<id>.pt`` with its coordinates and ``.meta.json``."""
        places = self.read_coords(path, slide)
        meta = read_meta(path)
        if path.suffix.lower() == ".npz":
            with reading(path), np.load(path, allow_pickle=False) as archive:
                features_TC = archive["features"]
        else:
            features_TC = read_tensor(path)
        header = {"encoder": meta.get("encoder_name") or None, "token_mask": token_mask_of(meta)}
        return features_of(places, features_TC, **header)

    def read_coords(self, path: Path, slide: SlideInfo | None) -> TileCoords:
        """Read hs2p's coordinates from the file itself, or from the one that belongs to a feature file."""
        if path.name.endswith(NPZ_ENDING):
            return hs2p.read_hs2p_coords(path, slide)
        meta = read_meta(path)
        slide_id = str(meta.get("sample_id") or path.stem)
        expected = _tiles_folder(path) / f"{slide_id}{NPZ_ENDING}"
        candidates = [expected, *(Path(str(meta[key])) for key in ("coordinates_npz_path",) if meta.get(key))]
        source = next((file for file in candidates if file.is_file()), None)
        if source is not None:
            places = hs2p.read_hs2p_coords(source, slide)
            return TileCoords(**{**vars(places), "slide_id": slide_id, "layout": self.name, "source": path})
        # hs2p writes no file of coordinates if there are no tiles.
        empty = expected.with_name(slide_id + META_ENDING)
        if meta.get("num_tiles") == 0 and empty.is_file():
            header = hs2p.header_of_meta(empty)
            return TileCoords(**vars(header), coords_T2=np.empty((0, 2), np.int64), layout=self.name, source=path)
        raise SlideError(
            f"features of slide2vec must have their coordinates, got no file {as_text(expected)}; copy its folder "
            "tiles too"
        )

    def path_of(self, root: Path, header: TileHeader) -> Path:
        """Return the path ``tile_embeddings/<id>.pt`` below ``root``."""
        return root / "tile_embeddings" / f"{header.slide_id}.pt"

    @contextmanager
    def writing(
        self, root: str | Path, header: TileHeader, channels: int, dtype: np.dtype | type = np.float32
    ) -> Iterator[TakeTiles]:
        """Write coordinates, features and their ``.meta.json``, with the rows in hs2p's order."""
        slide_id, root = writable_id(header), Path(root)
        final = self.path_of(root, header)
        tiles = hs2p.WritingTiles(root, header)
        final.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            # The file whose context is entered first appears last.
            pt, meta = (stack.enter_context(replacing(path)) for path in (final, meta_of(final)))
            stack.enter_context(tiles)
            spool = stack.enter_context(TensorSpool(pt, channels, dtype))

            def take(features_BC: np.ndarray, coords_B2: np.ndarray, tissue_B: np.ndarray | None = None) -> None:
                spool.append(np.asarray(features_BC))
                tiles.append(coords_B2, tissue_B)

            yield take
            if tiles.taken != spool.rows:
                raise ValueError(
                    f"a slide must have coordinates for each row of features, got {tiles.taken} coordinates for "
                    f"{spool.rows} rows of {slide_id!r}; give both of each batch"
                )
            order = tiles.save()
            spool.save(order)
            hs2p.write_json(meta, _metadata(header, channels, len(order), spool.dtype, tiles.path))


def _metadata(header: TileHeader, channels: int, tiles: int, dtype: np.dtype, npz: Path) -> dict[str, Any]:
    return {
        "sample_id": header.slide_id,
        "artifact_type": "tile_embeddings",
        "format": "pt",
        "feature_dim": channels,
        "num_tiles": tiles,
        "encoder_name": header.encoder or "unknown",
        "encoder_level": "tile",
        "coordinates_npz_path": str(npz) if tiles else "",
        "coordinates_meta_path": str(npz.with_name(header.slide_id + META_ENDING)),
        "tiles_tar_path": "",
        "image_path": str(header.slide_path or ""),
        "mask_path": None,
        "tile_size_lv0": header.patch_size_lv0,
        "backend": "maskattn",
        "read_tile_size_px": header.patch_size_lv0,
        "requested_tile_size_px": header.patch_size_px,
        "encoder_input_size_px": header.patch_size_px if tiles else None,
        "requested_spacing_um": header.spacing_um,
        "feature_dtype": "fp16" if dtype == np.float16 else "fp32",
        "annotation": None,
        "token_mask": header.token_mask,
    }


def meta_of(path: Path) -> Path:
    """Return the path of the ``.meta.json`` that belongs to a feature file."""
    return path.with_name(f"{path.stem}.meta.json")


def read_meta(path: Path) -> dict[str, Any]:
    """Read the ``.meta.json`` of a feature file; return an empty dictionary if there is none."""
    meta_path = meta_of(path)
    if not meta_path.is_file():
        return {}
    with reading(meta_path):
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError(f"it must be an object, got a {type(meta).__name__}")
        return meta


def _tiles_folder(path: Path) -> Path:
    """Return the folder of coordinates; ``tile_embeddings`` may have a subfolder for each class of annotations."""
    folder = path.parent
    if folder.parent.name == "tile_embeddings":
        return folder.parent.parent / "tiles" / folder.name
    return folder.parent / "tiles"
