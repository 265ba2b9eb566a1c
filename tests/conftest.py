"""The setup of every test process, before it imports anything else, and the fixtures that all tests share."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maskattn.torchvision_names import name_operators


def _missing(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is None for module in modules)


# Annotations have shapes only if this package comes before them (maskattn/shapes.py).
if not _missing("jaxtyping"):
    importlib.import_module("jaxtyping")

# On a machine with a GPU but without the slide libraries or hypothesis, the rest of the suite still runs.
collect_ignore_glob = []
_SLIDE = "openslide cv2 tifffile imagecodecs h5py shapely PIL matplotlib typer rich safetensors"
if _missing(*_SLIDE.split()):
    collect_ignore_glob += ["slide/*", "demo/*", "viewer/*", "test_cli.py", "nn/test_slide_model.py"]
if _missing("js_lib_leaflet"):
    collect_ignore_glob += ["viewer/*"]
if _missing("pydicom"):
    collect_ignore_glob += ["slide/test_damaged_files.py", "slide/test_identify.py"]
if _missing("hypothesis"):
    collect_ignore_glob += ["native/*", "slide/*", "test_packing.py"]

# torchvision's wheel is built for CUDA torch, so that with a CPU torch neither it nor timm can be imported without
# these names, which exist as long as the object that is kept here.
_names = None if _missing("torchvision") or torch.cuda.is_available() else name_operators()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run on one thread, on which small work is fastest, especially on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_bundle(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the bundled model, which other tests cover, by a small one."""
    from small_slides import small_model

    from maskattn.cli import slide_runs

    bundle = tmp_path_factory.mktemp("bundle") / "model.safetensors"
    small_model().save(bundle)
    monkeypatch.setattr(slide_runs, "BUNDLED", bundle)


@pytest.fixture(scope="session")
def shared_slides() -> Path:
    """Return the folder of real and broken slides that may be next to the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "slides"
    if not folder.is_dir():
        pytest.skip("the real and broken slides are not next to this checkout")
    return folder
