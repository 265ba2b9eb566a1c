from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskattn.slide.names import as_text, id_of_file, problem_of_id, shortened


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text("\n\u2028\u2029\x85ab").map(str.encode))
def test_any_file_name_becomes_one_line_that_every_encoding_takes(name: bytes) -> None:
    text = as_text(os.fsdecode(name))
    assert len(text.splitlines()) <= 1
    assert text.encode().decode() == text
    assert not any(ord(sign) < 32 for sign in text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain.svs", "plain.svs"),
        ("Gefäß µm.svs".encode(), "Gefäß µm.svs"),
        (b"Gef\xe4\xdf.svs", "Gef%E4%DF.svs"),
        (b"a\nb\0c\x1b", "a%0Ab%00c%1B"),
    ],
)
def test_only_what_has_no_text_is_written_out(name: bytes, text: str) -> None:
    assert as_text(os.fsdecode(name)) == text


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [
        ("x.svs", "x"),
        ("case 1.2.svs", "case 1.2"),
        ("x.ome.tif", "x"),
        ("x.OME.TIFF", "x"),
        ("x.ome.btf", "x"),
        ("x.ome.tf8", "x"),
        ("x.ome.svs", "x.ome"),
        ("x.somme.tif", "x.somme"),
        (".ome.tif", ".ome"),
        (os.fsdecode(b"Gef\xe4\xdf.tif"), "Gef%E4%DF"),
    ],
)
def test_id_of_a_file_is_its_name_without_its_ending(name: str, slide_id: str) -> None:
    assert id_of_file(f"some.where/{name}") == slide_id


@pytest.mark.parametrize("slide_id", ["a", "Gefäß 1.2 (copy)", "summary", "x" * 200, "CON", "a.partial"])
def test_id_that_can_name_a_folder_is_accepted(slide_id: str) -> None:
    assert problem_of_id(slide_id) is None


@pytest.mark.parametrize(
    ("slide_id", "words"),
    [
        ("a/b", "'a/b'"),
        ("a\\b", "no / or"),
        ("..", "leading dot"),
        (".hidden", "leading dot"),
        ("a\nb", "a%0Ab"),
        ("a\0", "a%00"),
        ("\x1b[31m", "%1B"),
        ("ä" * 101, "200 bytes"),
        ("x" * 5000, "…"),
        ("\udce4", "%E4"),
        ("summary.csv", "name of the run's table"),
        ("Summary.CSV", "name of the run's table"),
    ],
)
def test_id_that_cannot_name_a_folder_is_refused_in_one_short_line(slide_id: str, words: str) -> None:
    problem = problem_of_id(slide_id)
    assert problem is not None
    assert words in problem
    assert problem.isprintable()
    assert len(problem) < 600


def test_very_long_name_keeps_its_start_and_its_end() -> None:
    assert shortened("start" + "x" * 9000 + "end.svs").startswith("startx")
    assert shortened("start" + "x" * 9000 + "end.svs").endswith("xend.svs")
    assert len(shortened("x" * 9000)) < 400
    assert shortened("short.svs") == "short.svs"
