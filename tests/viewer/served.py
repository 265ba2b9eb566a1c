"""How tests serve what lies at a path."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskattn.viewer.answers import Answers
from maskattn.viewer.catalogue import read_catalogue
from maskattn.viewer.server import ViewerServer


@contextmanager
def serving(path: Path, slides_dir: Path | None = None) -> Iterator[ViewerServer]:
    """A viewer of what lies at a path, served by a thread."""
    with ViewerServer(Answers(read_catalogue(path, slides_dir))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
