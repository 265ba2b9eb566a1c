"""HDF5 files on a disk that fills up give an error and no file, wherever in the writing it happens, and no crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from maskattn.slide.h5_files import writing_h5

# A process of its own: HDF5 used to end it. The limit on a file's size refuses writes as a full disk does.
SCRIPT = """
import gc, resource, sys
from pathlib import Path
import numpy as np
from maskattn.slide.h5_files import writing_h5
folder, bytes_free = Path(sys.argv[1]), int(sys.argv[2])
rows = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32)

def write():
    with writing_h5(folder / "table.h5") as file:
        table = file.create_dataset("features", (0, 40), np.float32, maxshape=(None, 40), chunks=(16, 40))
        folded = file.create_dataset("tokens", (8, 64), np.float32, chunks=(1, 64), compression="gzip")
        for batch in range(4):
            table.resize(64 * (batch + 1), axis=0)
            table[64 * batch :] = rows
        folded[...] = rows[:8, :1] * np.ones(64)
        table.attrs["name"] = "slide" * 100

resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_free, resource.RLIM_INFINITY))
refused = 0
for limit in range(0, bytes_free, 997):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write()
    except OSError as error:
        assert "File too large" in str(error), error
        refused += 1
    gc.collect()
    assert [path.name for path in folder.iterdir()] in ([], ["table.h5"])
    for path in folder.iterdir():
        path.unlink()
print(refused)
"""


def test_disk_that_fills_up_anywhere_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    whole = 70_000
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(whole)], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert 40 < int(ended.stdout) < whole // 997


def test_file_is_complete_and_read_by_the_library_alone(tmp_path: Path) -> None:
    rows = np.arange(600, dtype=np.float32).reshape(60, 10)
    with writing_h5(tmp_path / "table.h5") as file:
        table = file.create_dataset("features", (0, 10), np.float32, maxshape=(None, 10), chunks=(7, 10))
        for first in range(0, 60, 20):
            table.resize(first + 20, axis=0)
            table[first:] = rows[first : first + 20]
            file.flush()
            np.testing.assert_array_equal(table[...], rows[: first + 20])
        file.attrs["name"] = "slide"
        assert not (tmp_path / "table.h5").exists()
    with h5py.File(tmp_path / "table.h5") as file:
        np.testing.assert_array_equal(file["features"][...], rows)
        assert file.attrs["name"] == "slide"


def test_error_of_the_writer_is_its_own_and_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with writing_h5(tmp_path / "table.h5") as file:
            file.create_dataset("features", data=np.ones(9))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write_half()
    assert not list(tmp_path.iterdir())
