"""The scripts that make docs/evidence.md: their data are as described, and their contenders agree."""

from __future__ import annotations

import pytest
import torch

for module in ("cv2", "sklearn", "captum", "matplotlib"):
    pytest.importorskip(module)

from bench.cpu.explanation_price import price, table  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.digits import TRAINING_DIGITS, compose, load_glyphs, new_model  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.explanations import judge  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.slides import GRID, IMAGE_PX, draw  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.table import Row, markdown_table, mean_and_error, write_section  # noqa: E402 (what may be missing is skipped first)


def test_scenes_hold_two_different_digits_in_their_halves_and_repeat_by_seed():
    glyphs, labels = load_glyphs()
    scenes = compose(glyphs[TRAINING_DIGITS:], labels[TRAINING_DIGITS:], 30, seed=3)
    assert (scenes.classes_B2[:, 0] != scenes.classes_B2[:, 1]).all()
    assert scenes.areas_B2HW.flatten(2).any(2).all()
    assert not scenes.areas_B2HW[:, 0, :, 6:].any()
    assert not scenes.areas_B2HW[:, 1, :, :6].any()
    again = compose(glyphs[TRAINING_DIGITS:], labels[TRAINING_DIGITS:], 30, seed=3)
    assert torch.equal(scenes.images_BIXY, again.images_BIXY)


def test_strokes_lie_on_tokens_of_glass_alone():
    for seed in range(4):
        clean, marked, keep, lesion, label = draw(seed)
        changed = (clean != marked).any(axis=0).reshape(GRID, IMAGE_PX // GRID, GRID, IMAGE_PX // GRID).any(axis=(1, 3))
        assert changed.any()
        assert not (changed & keep).any()
        assert not (lesion & ~keep).any()
        assert lesion.any() == bool(label)


def test_all_methods_are_judged_and_the_table_marks_the_best():
    glyphs, labels = load_glyphs()
    scenes = compose(glyphs, labels, 3, seed=0)
    names = ["CDAM", "attention"]
    rows, maps = judge(new_model(0), scenes.images_BIXY, scenes.classes_B2, scenes.areas_B2HW, names=names)
    assert [row.name for row in rows] == [*names, "random"]
    assert maps["CDAM"].shape == (3, 2, 8, 12)
    assert all(values.shape == (3,) for row in rows for values in row.values.values())
    assert rows[1].values["two-object contrast"].abs().max() < 1e-6  # attention knows no class
    assert rows[1].values["class correlation"].min() > 1 - 1e-6
    table = markdown_table(rows, ("box",), ("class",))
    assert table.count("**") == 2 * 2
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_means_leave_out_what_is_not_finite():
    mean, error = mean_and_error(torch.tensor([1.0, 3.0, float("nan")]))
    assert (mean, error) == (2.0, pytest.approx(1.0))
    row = Row("one", {"m": torch.tensor([float("nan")])})
    assert "nan" in markdown_table([row])


def test_a_measured_part_of_a_page_is_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- measured: a -->\nold\n<!-- end -->\n\nTail\n")
    write_section(page, "a", "new")
    write_section(page, "b", "more")
    text = page.read_text()
    assert "old" not in text
    assert text.index("new") < text.index("Tail") < text.index("more")


def test_every_method_of_the_last_block_has_a_price_beside_a_prediction():
    found = price(tokens=16, classes=2, rounds=1, limit=60.0, width=64)
    assert {
        "block",
        "read",
        "cdam",
        "integrated-norm",
        "integrated-weights",
        "integrated-value",
        "row-ablation",
    } <= found.keys()
    assert "token-ablation" not in found
    fixed = {"block": 1.0, "read": 1.0, "cdam": 1.2, "integrated-value": 6.0}
    lines = table({16: fixed, 4096: {name: 2 * seconds for name, seconds in fixed.items()}}, 2).splitlines()
    assert lines[-2:] == ["| CDAM | 1.100 | 1.100 |", "| Integrated CDAM, value | 1.500 | 1.500 |"]
