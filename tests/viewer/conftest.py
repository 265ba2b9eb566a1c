"""A run of three slides, one of them broken and one of an evil name, and a viewer that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from run_of_three import write_run
from served import serving

from maskattn.viewer.server import ViewerServer


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("viewed"))


@pytest.fixture(scope="module")
def viewer(out: Path) -> Iterator[ViewerServer]:
    with serving(out) as server:
        yield server
