"""The files of the page, read once at the start of the viewer: this package's own, and Leaflet's from its wheel."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path

__all__ = ["read_assets"]

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_LEAFLET = "js_lib_leaflet"


def read_assets() -> dict[str, tuple[str, bytes]]:
    """Return the content type and the bytes of each file, by the path of its URL.

    Raises:
        ModuleNotFoundError: the extra ``view`` is not installed.
    """
    own = importlib.resources.files("maskattn.viewer").joinpath("assets")
    files = {f"/assets/{entry.name}": entry.read_bytes() for entry in own.iterdir() if "." in entry.name}
    files["/"] = files.pop("/assets/index.html")
    folder = _leaflet()
    files |= {f"/assets/{name}": (folder / name).read_bytes() for name in ("leaflet.js", "leaflet.css")}
    return {path: (f"{_KINDS[Path(path).suffix or '.html']}; charset=utf-8", data) for path, data in files.items()}


def _leaflet() -> Path:
    # The package is located but not imported: its code is for Django, and only its files are needed here.
    spec = importlib.util.find_spec(_LEAFLET)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named '{_LEAFLET}'", name=_LEAFLET)
    return Path(spec.submodule_search_locations[0]) / "static" / "js_lib_leaflet"
