"""Names of slides in every script, drawn or left out; with fonts that the tests make themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
from fontTools.fontBuilder import FontBuilder  # noqa: E402 -- matplotlib brings it
from fontTools.pens.ttGlyphPen import TTGlyphPen  # noqa: E402 -- the tests are skipped without matplotlib
from matplotlib import font_manager  # noqa: E402 -- the tests are skipped without matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402 -- the tests are skipped without matplotlib
from matplotlib.figure import Figure  # noqa: E402 -- the tests are skipped without matplotlib
from PIL import Image, ImageDraw  # noqa: E402 -- the tests are skipped without matplotlib

from maskattn import lettering  # noqa: E402 -- the tests are skipped without matplotlib
from maskattn.explain.pictures import draw_explanation  # noqa: E402 -- the tests are skipped without matplotlib
from maskattn.lettering import drawable, families_of, legible, wrapped  # noqa: E402 -- the tests are skipped without matplotlib
from maskattn.slide.overlay import write_heatmap  # noqa: E402 -- the tests are skipped without matplotlib

RAQM = hasattr(matplotlib.ft2font, "__libraqm_version__")
NAMES = {
    "plain": "slide_01",
    "han": "肝脏_01",
    "arabic": "سلام عليكم",
    "hebrew": "שלום",
    "hindi": "हिन्दी",
    "thai": "ไทย",
    "combining": "e\u0301 x\u0301\u0323",
    "emoji": "🙂👨‍👩‍👧 ok",
    "controls": "a\x00b\x1b[31m\nc\td\u202e",
    "no text": "a\udcff",
    "unassigned": "a\u0378\ue000",
    "long": "x" * 3000,
    "long wide": "W" * 200,
    "mathematics": "$\\alpha_1^{$ % _^",
    "empty": "",
    "spaces": "   ",
}


def make_font(path: Path, family: str, signs: str) -> Path:
    """A font of squares."""
    builder = FontBuilder(1000, isTTF=True)
    names = {ord(sign): f"u{ord(sign):x}" for sign in signs}
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for place in ((100, 800), (800, 800), (800, 0)):
        pen.lineTo(place)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys([".notdef", *names.values()], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (900, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=200, usWeightClass=400)
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def own_fonts_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with the fonts that matplotlib brings, whatever else this one has."""
    manager = font_manager.fontManager
    brought = [entry for entry in manager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(manager, "ttflist", brought)
    lettering._fonts.cache_clear()
    manager._findfont_cached.cache_clear() if hasattr(manager, "_findfont_cached") else None
    yield
    lettering._fonts.cache_clear()


def test_what_the_own_font_has_is_drawn_without_looking_for_others(
    own_fonts_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lettering._Fonts, "_candidates", staticmethod(lambda: pytest.fail("no font is to be sought")))
    for name in ("slide_01", "Gefäß 12 µm × 3", "срез", "τομή"):
        assert drawable(name) == name
        assert families_of(name) == ["DejaVu Sans"]


def test_plain_characters_are_in_matplotlibs_own_font_and_need_no_shaping() -> None:
    own = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    assert [sign for sign in sorted(lettering._PLAIN) if not own.get_char_index(ord(sign))] == []
    assert [sign for sign in sorted(lettering._PLAIN) if lettering._needs_shaping(sign)] == []


@pytest.mark.parametrize("text", ["H", "relevance for class 'high', 0.946", "срез 12 µm"])
def test_a_plain_line_looks_as_matplotlib_draws_it(text: str) -> None:
    ink, baseline = lettering.drawn_line(text, 9)
    theirs, their_baseline = lettering._drawn_by_matplotlib(text, 9, 100)
    extents = []
    for drawn, base in ((ink, baseline), (theirs, their_baseline)):
        rows, columns = (np.flatnonzero((drawn > 100).any(axis=axis)) for axis in (1, 0))
        extents.append([rows[0] - base, rows[-1] - base, columns[0], columns[-1], drawn.sum() / 255])
    ours, other = np.array(extents)
    np.testing.assert_allclose(ours[:3], other[:3], atol=1)
    np.testing.assert_allclose(ours[3:], other[3:], rtol=0.1, atol=1.5)


@pytest.mark.parametrize("size_pt", [7, 8, 9, 11.3])
def test_a_plain_line_is_drawn_word_by_word_as_pillow_draws_it_at_once(size_pt: float) -> None:
    rng = np.random.default_rng(0)
    signs = [*sorted(lettering._PLAIN), *[" "] * 30]
    numbers = ("".join(rng.choice([*"0123456789.−+ "], 12)) for _ in range(100))
    for text in (
        "",
        " ",
        "  j ",
        "Ty AV fj",
        *numbers,
        *("".join(rng.choice(signs, rng.integers(1, 60))) for _ in range(200)),
    ):
        ink, baseline = lettering.drawn_line(text, size_pt)
        expected = Image.new("L", ink.shape[::-1])
        font = lettering._own_font(size_pt * 100 / 72)
        ImageDraw.Draw(expected).text((0, baseline), text, fill=255, font=font, anchor="ls")
        np.testing.assert_array_equal(ink, np.asarray(expected), text)


def test_a_script_that_no_font_has_is_left_out_and_sought_once(
    own_fonts_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = []
    candidates = lettering._Fonts._candidates
    monkeypatch.setattr(lettering._Fonts, "_candidates", staticmethod(lambda: searches.append(1) or candidates()))
    for name in ("肝脏_01", "脾_02", "肾"):
        assert drawable(name) == ""
    assert len(searches) == 1
    assert legible("肝脏_01") == "??_01"


def test_a_font_of_the_machine_that_has_the_signs_is_taken(own_fonts_only: None, tmp_path: Path) -> None:
    font_manager.fontManager.addfont(make_font(tmp_path / "squares.ttf", "Squares For Tests", "肝脏"))
    assert drawable("肝脏_01") == "肝脏_01"
    assert families_of("肝脏_01") == ["DejaVu Sans", "Squares For Tests"]
    assert drawable("肝癌") == ""  # it lacks the second


def test_broken_and_vanished_fonts_are_passed_over(own_fonts_only: None, tmp_path: Path) -> None:
    for name in ("gone", "broken"):
        font_manager.fontManager.addfont(make_font(tmp_path / f"{name}.ttf", f"Aa {name}", "肝"))
    (tmp_path / "gone.ttf").unlink()
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert drawable("肝") == ""
    font_manager.fontManager.addfont(make_font(tmp_path / "whole.ttf", "Zz Whole", "肝"))
    lettering._fonts.cache_clear()
    assert families_of("肝") == ["DejaVu Sans", "Zz Whole"]


def test_controls_and_marks_of_direction_never_reach_a_picture() -> None:
    assert drawable(NAMES["controls"]) == "ab[31m c d"
    assert drawable(NAMES["no text"]) == "a"
    assert drawable("e\u0301") == "é"
    assert drawable(" \u200b\u202e ") == ""


def test_letters_that_join_or_run_from_the_right_are_left_out_where_text_is_not_shaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lettering, "_is_shaped", lambda: False)
    for name in ("arabic", "hebrew", "hindi", "thai", "combining"):
        assert drawable(NAMES[name]) == ""
        assert "?" in legible(NAMES[name])
    assert drawable("été") == "été"
    if RAQM:
        monkeypatch.setattr(lettering, "_is_shaped", lambda: True)
        assert drawable(NAMES["arabic"]) == NAMES["arabic"]
        (line,) = wrapped(f"{NAMES['hebrew']}: relevance", 300, 9)
        assert line == f"\u200e{NAMES['hebrew']}: relevance"  # the line as a whole runs from the left


@pytest.mark.parametrize("size_pt", [8, 9, 10])
@pytest.mark.parametrize(
    "text",
    ["x" * 500, "W" * 500, "i" * 300, "words of any length " * 8, "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 4, "срез " * 40],
)
def test_lines_fit_their_width_as_matplotlib_draws_them(text: str, size_pt: int) -> None:
    figure = Figure(figsize=(8, 2), dpi=100)
    renderer = FigureCanvasAgg(figure).get_renderer()
    lines = wrapped(text, 320, size_pt)
    assert 1 <= len(lines) <= 4
    for line in lines:
        assert figure.text(0, 0, line, fontsize=size_pt, parse_math=False).get_window_extent(renderer).width <= 320
    if len(lines) < 4:
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_no_title_breaks_a_picture_or_warns(
    own_fonts_only: None, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    thumbnail = np.full((240, 420, 3), 240, np.uint8)
    values = np.full((240, 420), np.nan, np.float32)
    values[60:180, 100:300] = np.linspace(-1, 1, 200)
    for title in (name, f"{drawable(name)}: relevance"):
        write_heatmap(tmp_path / "map.png", thumbnail, values, title, "relevance (+ for, − against)", "diverging")
    with Image.open(tmp_path / "map.png") as image:
        assert image.width == 530
        assert image.height <= 240 + 12 + 4 * 17
    relevance = torch.linspace(-1, 1, 12).view(3, 4)
    figure = draw_explanation(thumbnail, relevance.abs(), {name: relevance}, name)
    figure.savefig(tmp_path / "panel.png", dpi=60)
    assert caplog.records == []
