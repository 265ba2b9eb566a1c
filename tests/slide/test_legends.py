"""The text, ticks and colours of heat maps: those that matplotlib would draw, without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from maskattn.slide.colours import COLOUR_MAPS, colour_table
from maskattn.slide.legends import draw_colour_bar, draw_scale_bar, draw_text, round_length, tick_labels

ALL_COLOURS = [name for names in COLOUR_MAPS.values() for name in names]


def matplotlib_labels(ticks: np.ndarray) -> tuple[list[str], str]:
    """The tick labels and the common factor of a colour bar in matplotlib."""
    axis = Figure().subplots().yaxis
    axis.axes.set_ylim(ticks[0], ticks[-1])
    formatter = ScalarFormatter()
    formatter.set_powerlimits((-2, 3))
    axis.set_major_formatter(formatter)
    return list(formatter.format_ticks(ticks)), formatter.get_offset()


@pytest.mark.parametrize("signed", [True, False])
def test_tick_labels_are_those_of_matplotlib(signed: bool) -> None:
    rng = np.random.default_rng(0)
    shares = np.array([-1.0, -0.5, -0.25, -0.05, 0.0, 0.05, 0.25, 0.5, 1.0])[0 if signed else 4 :]
    ends = [*10 ** rng.uniform(-9, 9, 60), 1.0, 0.1, 0.01, 0.0999999, 10.0, 999.9, 1000.0, 7.63e-3]
    for end in ends:
        ticks = np.array(sorted(shares * end))
        labels, factor = tick_labels(ticks)
        theirs, their_factor = matplotlib_labels(ticks)
        assert labels == theirs
        assert factor.replace("−", "-") == their_factor.replace("−", "-")


@pytest.mark.parametrize("name", ALL_COLOURS)
def test_colours_are_those_of_matplotlib_within_rounding(name: str) -> None:
    theirs = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    assert np.abs(colour_table(name).astype(int) - theirs).max() <= 1


def test_a_colour_bar_runs_from_its_low_end_to_its_high_end_with_the_ticks_on_the_square_root_scale() -> None:
    strip = np.full((300, 110, 3), 255, np.uint8)
    draw_colour_bar(strip, 20, 201, (-4.0, 4.0), "RdBu_r", "relevance")
    table = colour_table("RdBu_r")
    middle = strip[:, 20]
    np.testing.assert_array_equal(middle[21], table[254])
    np.testing.assert_array_equal(middle[219], table[1])
    assert (middle[20] == 0).all()
    assert (middle[220] == 0).all()
    ticks = np.flatnonzero((strip[:, 29] == 0).all(axis=1))
    positions = 0.5 + 0.5 * np.array([-1.0, -(0.5**0.5), -0.5, -(0.05**0.5), 0, 0.05**0.5, 0.5, 0.5**0.5, 1.0])
    np.testing.assert_allclose(ticks, 20 + 200 * (1 - positions[::-1]), atol=0.51)
    assert (strip[20:221, 70:] < 128).any(), "the label"
    assert (strip[:10] == 255).all()
    assert (strip[230:] == 255).all()


@pytest.mark.parametrize(("um_per_px", "length_px"), [(0.5, 40), (8.0, 62.5), (16.3, 61.3)])
def test_a_scale_bar_covers_its_length_to_a_fraction_of_a_pixel(um_per_px: float, length_px: float) -> None:
    strip = np.full((40, 110, 3), 255, np.uint8)
    draw_scale_bar(strip, 4, um_per_px)
    assert (255 - strip[6, :, 0].astype(float)).sum() / 255 == pytest.approx(length_px, abs=0.05)
    written = np.flatnonzero((strip < 128).any(axis=(0, 2)))
    assert written[0] + written[-1] == pytest.approx(109, abs=2), "all of it is in the middle"


@pytest.mark.parametrize(("align", "expected"), [("left", 0), ("centre", 1), ("right", 2)])
def test_text_starts_is_centred_or_ends_where_it_is_asked(align: str, expected: int) -> None:
    image = np.full((30, 200, 3), 255, np.uint8)
    draw_text(image, "HIH", 100, 20, 9, align)
    rows, columns = (np.flatnonzero((image < 128).any(axis=(axis, 2))) for axis in (1, 0))
    assert rows[-1] == 19, "capitals stand on the baseline"
    places = columns[0], (columns[0] + columns[-1]) / 2, columns[-1]
    assert places[expected] == pytest.approx(100, abs=2)


def test_text_beyond_the_edges_is_cut_off() -> None:
    for x, baseline in ((-20.0, 5.0), (190.0, 5.0), (-500.0, 5.0), (10.0, -50.0), (10.0, 90.0)):
        image = np.full((30, 200, 3), 255, np.uint8)
        draw_text(image, "relevance", x, baseline, 9)
        assert image.shape == (30, 200, 3)
        assert (image < 128).any() == (x > -100 and 0 < baseline < 40)


@pytest.mark.parametrize(("most", "expected"), [(0.7, 0.5), (1.0, 1.0), (4.99, 2.0), (5.0, 5.0), (99999.0, 50000.0)])
def test_a_round_length_is_one_two_or_five(most: float, expected: float) -> None:
    assert round_length(most) == expected


def test_a_heat_map_needs_no_matplotlib(tmp_path: Path) -> None:
    code = f"""
import sys, numpy as np
from pathlib import Path
from maskattn.lettering import drawable
from maskattn.slide.overlay import write_heatmap
values = np.linspace(-1, 1, 90 * 80).reshape(90, 80)
for kind in ("diverging", "sequential"):
    write_heatmap(Path({str(tmp_path)!r}, f"{{kind}}.png"), np.full((90, 80, 3), 200, np.uint8), values,
                  drawable("Gefäß срез τομή"), "relevance (+ for, − against)", kind, 0.5)
print([name for name in ("matplotlib", "torch", "jaxtyping") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"diverging.png", "sequential.png"}
