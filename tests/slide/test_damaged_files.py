"""No damaged slide crashes a run (see ``fuzz_files.py``), and faults would be detected (see ``fuzz_pool.py``)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from fuzz_anatomy import find_parts
from fuzz_damage import damage
from fuzz_downfalls import end_as_told
from fuzz_examination import Examination, FaultError, check_clear, check_folder, examine
from fuzz_pool import Limits, run_tasks
from fuzz_sources import KINDS, Source, draw_sources

from maskattn.errors import SlideError
from maskattn.slide.reader import SlideReader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and memory are read as Linux gives them")

FUZZ = Path(__file__).with_name("fuzz_files.py")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    return draw_sources(tmp_path_factory.mktemp("sources"))


def test_damaged_files_do_no_harm():
    command = [sys.executable, "-W", "ignore", str(FUZZ), "--files", "60", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (counts,) = re.findall(r"^\| all \| 60 \| (\d+) \| (\d+) \| (\d+) \|", done.stdout, re.MULTILINE)
    assert min(map(int, counts)) >= 3, f"read, in part, refused: {counts}; the damage is too tame or too rough"


def test_the_slides_can_be_read_completely_before_they_are_damaged(sources, tmp_path):
    assert {source.kind for source in sources} == set(KINDS)
    for number, source in enumerate(sources):
        work = tmp_path / str(number)
        work.mkdir()
        finding = examine(Examination(source.path, work, seed=0, predict=number % 4 == 0))
        assert finding.outcome == "read", f"{source.name}: {finding}"


def test_the_same_seed_does_the_same_damage(sources):
    changed = 0
    for source in sources:
        data = source.path.read_bytes()
        done = [damage(Random(seed), data) for seed in range(5)]
        assert done == [damage(Random(seed), data) for seed in range(5)]
        changed += sum(after != data for after, _ in done)
    assert changed >= 4 * len(sources)


def test_what_readers_trust_is_found_in_every_slide(sources):
    wanted = {
        "TIFF": ("tag 256: its value", "tag 324: value 3", "tag 325: its count", "tile 3: its bytes"),
        "SVS": ("tag 270: text", "tile 3: segment c4, length", "tag 324: value 3"),
        "DICOM": ("(0048,0006)", "(7fe0,0010)", "(5200,9229)", "VR", "length"),
    }
    for source in sources:
        names = [part.name for part in find_parts(source.path.read_bytes())]
        for words in wanted[source.kind]:
            if words.startswith("tile 3: segment") and "2000" in source.name:
                continue
            assert any(words in name for name in names), f"{source.name} has no {words}"


def refusal_of(path: Path) -> str:
    with pytest.raises(SlideError) as caught, SlideReader(path, isolated=True) as reader:
        reader.read_region(0, 0, (64, 64), (64, 64))
    check_clear(str(caught.value), True)
    return str(caught.value)


def named(sources: list[Source], name: str) -> Source:
    return next(source for source in sources if source.name == name)


@pytest.mark.parametrize("tag", [322, 323])
def test_openslide_is_not_asked_for_tiles_that_fit_no_memory(sources, tmp_path, tag):
    data = bytearray(named(sources, "TIFF deflate").path.read_bytes())
    part = next(part for part in find_parts(bytes(data)) if part.name.endswith(f"tag {tag}: its value or offset"))
    data[part.start : part.start + 4] = (2**31 - 1).to_bytes(4, "little")
    (tmp_path / "slide.tiff").write_bytes(data)
    assert "2147483647" in refusal_of(tmp_path / "slide.tiff")


def test_more_samples_than_colours_are_refused(sources, tmp_path):
    for name in ("TIFF 16 bit, planar", "TIFF deflate"):
        data = bytearray(named(sources, name).path.read_bytes())
        part = next(part for part in find_parts(bytes(data)) if part.name.endswith("tag 277: value 0"))
        data[part.start : part.start + 2] = (65_000).to_bytes(2, "little")
        (tmp_path / "slide.tiff").write_bytes(data)
        refusal_of(tmp_path / "slide.tiff")


def test_a_decoders_message_is_shown_in_printable_characters(sources, tmp_path):
    source = named(sources, "DICOM JPEG")
    data = bytearray(source.path.read_bytes())
    part = next(part for part in find_parts(bytes(data)) if "(0008,0060)" in part.name and part.name.endswith("VR"))
    data[part.start : part.start + 2] = b"\x06\x07"
    (tmp_path / source.path.name).write_bytes(data)
    assert "%06%07" in refusal_of(tmp_path / source.path.name)


def test_a_uid_with_an_impossible_length_is_not_shown(sources, tmp_path):
    source = named(sources, "DICOM JPEG")
    for element in ("(0002,0002)", "(0002,0010)"):
        data = bytearray(source.path.read_bytes())
        part = next(part for part in find_parts(bytes(data)) if element in part.name and part.name.endswith("length"))
        data[part.start : part.start + 2] = b"\x7d\x13"
        (tmp_path / source.path.name).write_bytes(data)
        assert "PYDICOM" not in refusal_of(tmp_path / source.path.name)


def test_a_property_whose_name_is_not_text_is_skipped(sources, tmp_path):
    data = named(sources, "SVS JPEG").path.read_bytes()
    (tmp_path / "slide.svs").write_bytes(data.replace(b"|AppMag = 20|Stripe", b"|AppMag = 20|S\xff\xfeipe"))
    with SlideReader(tmp_path / "slide.svs") as reader:
        assert reader.info.objective_power == 20
        assert not any("ipeWidth" in name for name in reader.info.properties)


def test_crashes_and_hangs_are_detected_and_the_next_file_is_examined(tmp_path):
    tasks = iter(["first", "abort", "second", "work", "exit", "third", "wait", "fourth"])
    limits = Limits(processor_s=0.3, wall_s=4.0)
    results = {result.task: result for result in run_tasks(end_as_told, tasks, tmp_path, 1, limits)}
    assert len(results) == 8, results
    assert {task: result.returned for task, result in results.items() if result.returned} == {
        task: f"returned {task}" for task in ("first", "second", "third", "fourth")
    }
    downfalls = {task: result.downfall for task, result in results.items() if result.downfall}
    assert downfalls == {"abort": "crash: SIGABRT", "work": "hang", "exit": "crash: exit 3", "wait": "hang"}
    assert "end_as_told" in results["abort"].log


def test_half_outputs_and_unclear_messages_are_faults(tmp_path):
    (tmp_path / ".slide.partial").mkdir()
    with pytest.raises(FaultError, match="partial"):
        check_folder(tmp_path, set())
    check_clear("a slide must be a file, got path='x', which is no file; check the path", True)
    for message in ("no", "a slide must open, got\nnothing; mend it", "a slide must open, got \x07; mend it"):
        with pytest.raises(FaultError):
            check_clear(message, True)
