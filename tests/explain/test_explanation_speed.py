"""bench/cpu/explanation_speed.py: its contenders agree, and its figures mean what the table says."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import pytest
import torch

if not Path("/proc/self/clear_refs").exists():
    pytest.skip("memory is read as Linux tells it", allow_module_level=True)

from bench.cpu.explanation_contenders import (
    Contender,
    Repeated,
    block_graph,
    contenders,
    explain_each,
    new_model,
    row_graph,
    whole_graph,
)
from bench.cpu.explanation_speed import Figure, Guard, Measured, Turns, free_mebibytes, measure, report, run
from maskattn.explain import CDAM
from maskattn.explain.token_scores import score_tokens_by_autograd

FORWARD_S, FIRST_BACKWARD_S, BACKWARD_S = 2.0, 8.0, 5.0


class Clock:
    """Stands still but for what contenders say they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def build_graph(self):
        self.now += FORWARD_S
        backwards = iter([FIRST_BACKWARD_S])

        def explain(c: int, *, keep_graph: bool) -> None:
            self.now += next(backwards, BACKWARD_S)

        return explain

    def contender(self, classes: int) -> Contender:
        def call() -> None:
            explain = self.build_graph()
            for c in range(classes):
                explain(c, keep_graph=True)

        return Contender("theirs", classes, call, Repeated("graph", 1, classes))


@pytest.fixture(autouse=True)
def quick_collection():
    """Every measured call collects garbage first, of which there is none among the many modules of a test run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    standing = Clock()
    monkeypatch.setattr("bench.cpu.explanation_speed.time", standing)
    return standing


def options(**changed: object) -> argparse.Namespace:
    small = {"tokens": [17, 65], "classes": [2, 3], "width": 64, "depth": 2, "m": 4, "rounds": 1}
    return argparse.Namespace(**{**small, "limit": 60.0, "longest": 1800.0, "threads": 1, "device": "cpu", **changed})


def no_guard() -> Guard:
    return Guard(longest=1e9, free=lambda: 1e9)


def test_every_graph_gives_cdams_map():
    model = new_model(classes=3, width=64, depth=2, side=4, device="cpu")
    x = torch.randn(1, 1, 8, 8)
    theirs = explain_each(whole_graph(model, x), range(3))[:, 1:].view(1, 3, 4, 4)
    torch.testing.assert_close(CDAM(model).attribute(x, "all"), theirs)
    with torch.no_grad():
        tokens = model.before_last_block(model.embed(x))
    torch.testing.assert_close(explain_each(row_graph(model, tokens), range(3))[:, 1:].view(1, 3, 4, 4), theirs)
    in_block = explain_each(block_graph(model, tokens), range(3))
    torch.testing.assert_close(in_block, score_tokens_by_autograd(model, tokens, "all")[0])
    torch.testing.assert_close(in_block[:, 1:].view(1, 3, 4, 4), theirs)
    assert all(p.grad is None for p in model.parameters())
    assert not model.last_block.norm1._forward_hooks


def test_contenders_explain_as_many_classes_as_they_say():
    model = new_model(classes=5, width=64, depth=2, side=4, device="cpu")
    x = torch.randn(1, 1, 8, 8)
    results = {(one.name, one.classes): one.call() for one in contenders(model, x, (2, 5), m=3)}
    for K in (2, 5):
        assert results["closed form", K][0].shape == (K, 17)
        assert results["CDAM", K].shape == (1, K, 4, 4)
        for name in ("autograd, one row", "autograd, block", "backward a class"):
            assert results[name, K].shape == (K, 17)
    assert len(results["3 full passes", 1]) == 3


@pytest.mark.parametrize("limit", [60.0, 50.0])
def test_repetitions_are_measured_completely_within_the_limit_and_extrapolated_beyond(limit, clock):
    turns = Turns({"graph": clock.build_graph}, [clock.contender(10)], limit)
    turns.turn(17, no_guard(), "cpu")
    found = turns.measured()
    counted, whole = FORWARD_S + 10 * BACKWARD_S, FORWARD_S + FIRST_BACKWARD_S + 9 * BACKWARD_S
    assert counted == 52
    if limit == 60:
        assert found.figures == {("theirs", 10): Figure(whole, found.figures["theirs", 10].mebibytes)}
        assert found.differences == {("theirs", 10): pytest.approx(counted / whole - 1)}
    else:
        assert found.figures["theirs", 10].seconds == counted
        assert found.figures["theirs", 10].counted
        assert not found.differences


def test_a_backward_that_is_long_is_run_once(clock):
    turns = Turns({"graph": clock.build_graph}, [clock.contender(10)], limit=4 * FIRST_BACKWARD_S)
    turns.turn(17, no_guard(), "cpu")
    assert clock.now == FORWARD_S + FIRST_BACKWARD_S
    assert turns.measured().figures["theirs", 10].seconds == FORWARD_S + 10 * FIRST_BACKWARD_S


def test_the_first_run_is_a_trial_and_what_is_long_is_run_once(clock):
    seconds = {"short": iter([3.0, 2.0, 1.0, 1.5]), "long": iter([11.0])}

    def contender(name: str) -> Contender:
        def call() -> None:
            clock.now += next(seconds[name])

        return Contender(name, 1, call)

    turns = Turns({}, [contender("short"), contender("long")], limit=40)
    best = []
    for _ in range(4):
        turns.turn(17, no_guard(), "cpu")
        best.append(turns.measured().figures["short", 1].seconds)
    assert best == [3.0, 2.0, 1.0, 1.0]
    assert turns.measured().figures["long", 1].seconds == 11


def test_contenders_that_would_not_fit_are_left_out_and_named_with_the_prediction(clock):
    guard = Guard(longest=1e9, free=lambda: 1000.0)
    guard.last = {("graph", 0): (17, 0.1, 200.0), ("ours", 1): (17, 0.1, 10.0)}
    ours = Contender("ours", 1, lambda: None)
    turns = Turns({"graph": clock.build_graph}, [ours, clock.contender(2)], limit=60)
    turns.turn(5 * 17, guard, "cpu")
    found = turns.measured()
    assert set(found.figures) == {("ours", 1)}
    assert found.left_out == {("theirs", 2): "it would need about 1,000 MiB, and 1,000 MiB were free"}
    text = report({85: found}, options())
    assert "theirs at 85 tokens and 2 classes (it would need about 1,000 MiB, and 1,000 MiB were free)" in text


def test_contenders_that_would_take_too_long_are_left_out_and_named():
    guard = Guard(longest=10, free=lambda: 1e9)
    guard.last = {("ours", 1): (10, 1.0, 1.0)}
    assert guard.objection(("ours", 1), 30) is None
    assert guard.objection(("ours", 1), 40) == "it would take up to 16 s"
    assert guard.objection(("new", 1), 40) is None


def test_counted_figures_and_their_ratios_are_marked():
    figures = {
        ("CDAM", 2): Figure(0.5, 10),
        ("backward a class", 2): Figure(1234.5, 50, counted=True),
        ("Smooth", 1): Figure(2, 10),
        ("4 full passes", 1): Figure(6, 5),
    }
    found = Measured(figures, {("4 full passes", 1): -0.125})
    text = report({17: found}, options())
    assert "| CDAM | backward a class | 2 | 17 | 0.5 s, 10 MiB | ≈ 1,234 s, 50 MiB | ≈ 2,469.0× | 5.0× |" in text
    assert "| Smooth | 4 full passes | 1 | 17 | 2 s, 10 MiB | 6 s, 5 MiB | 3.0× | 0.5× |" in text
    assert "1 times both: the largest difference is -12% (4 full passes, 17 tokens, 1 class)" in text


def test_every_length_and_number_of_classes_has_its_rows():
    text = report(run(options(rounds=0)), options())
    for K in (2, 3):
        for tokens in (17, 65):
            assert f"| CDAM | backward a class | {K} | {tokens} |" in text
    assert "| Smooth | 4 full passes | 1 | 65 |" in text
    assert "left out" not in text
    assert "Counted against whole" in text


def test_a_long_length_alone_is_judged_by_a_shorter_one(monkeypatch):
    monkeypatch.setattr("bench.cpu.explanation_speed.free_mebibytes", lambda device: 1e-3)
    results = run(options(tokens=[1200], classes=[2], rounds=0, m=1))
    assert list(results) == [1226]
    assert ("backward a class", 2) in results[1226].left_out


def test_memory_of_a_call_is_seen():
    seconds, mebibytes = measure(lambda: torch.ones(2**24).sum(), "cpu")
    assert seconds > 0
    assert 60 < mebibytes < 100
    assert 1 < free_mebibytes("cpu") < 2**24
