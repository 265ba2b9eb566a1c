from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from maskattn.errors import quoted

NAMES = [
    "a.svs",
    "my slides/a b.svs",
    "it's.svs",
    "$HOME;rm *.svs",
    "two\nlines\tand 'quotes' \\.svs",
    "肝脏_01.svs",
    os.fsdecode(b"not-\xff-text.svs"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_path_is_one_word_of_the_shell_on_one_line(name: str) -> None:
    if (bash := shutil.which("bash")) is None:
        pytest.skip("needs bash")
    word = quoted(name)
    assert len(word.splitlines()) == 1
    done = subprocess.run([bash, "-c", f"printf %s {word}"], check=True, capture_output=True)
    assert done.stdout == os.fsencode(name)


def test_a_plain_path_stays_as_it_is_and_none_is_taken_for_an_option() -> None:
    assert quoted("slides/a.svs") == "slides/a.svs"
    assert quoted("--out") == "./--out"
