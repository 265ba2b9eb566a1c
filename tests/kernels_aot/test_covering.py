"""The calls of the long runs without a GPU: what they cover, counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from bench.aot.covering import (
    DTYPES,
    KINDS,
    OPTION_SETS,
    TARGETS,
    WIDTHS,
    Case,
    covering,
    in_gluon,
    in_tf32x3,
    random_shapes,
)
from bench.aot.dry_run import long_one
from bench.aot.every_call import OF_CHUNKS, ON_HOPPER, OPERATIONS, Shape
from maskattn.kernels.tables.attention_short import SHORT_BELOW
from maskattn.kernels.tables.lookup import look_up

PROPERTIES = {
    "operation": tuple(OPERATIONS),
    "target": TARGETS,
    "dtype": tuple(DTYPES.values()),
    "width": tuple(WIDTHS),
    "options": tuple(OPTION_SETS),
    "kind": tuple(KINDS),
}


def properties(case: Case) -> dict[str, object]:
    like = case.like
    fields = like.options, like.without, like.shared_bias
    (options,) = (
        name
        for name, of in OPTION_SETS.items()
        if fields == (of.get("options", False), of.get("without", ()), of.get("shared_bias", False))
    )
    return {
        "operation": case.operation,
        "target": case.target,
        "dtype": like.dtype,
        "width": like.head_width,
        "options": options,
        "kind": case.kind,
    }


def combinations() -> Iterator[tuple[str, ...]]:
    """All pairs, and of an operation all pairs of what else it has besides the head width."""
    yield from itertools.combinations(PROPERTIES, 2)
    others = [name for name in PROPERTIES if name not in ("operation", "width")]
    yield from (("operation", *pair) for pair in itertools.combinations(others, 2))


@pytest.mark.parametrize("names", list(combinations()), ids="-".join)
def test_every_combination_is_among_the_calls(names):
    found = {tuple(properties(case)[name] for name in names) for case in covering(list(OPERATIONS))}
    assert found == set(itertools.product(*(PROPERTIES[name] for name in names)))


def test_every_operation_comes_once_with_every_head_width_and_no_call_has_the_name_of_another():
    cases = [*covering(list(OPERATIONS)), *covering(list(OF_CHUNKS), 4), *in_gluon(list(ON_HOPPER))]
    cases += in_tf32x3(["packed_attention", "masked_attention"])
    assert len({(case.target, case.name) for case in cases}) == len(cases)
    of_each = [(case.operation, case.like.head_width) for case in covering(list(OPERATIONS))]
    assert sorted(of_each) == sorted(itertools.product(OPERATIONS, WIDTHS))


def test_gluon_has_every_head_width_in_half_precision_with_all_options():
    cases = [properties(case) for case in in_gluon(["packed_attention_in_gluon"])]
    assert [case["width"] for case in cases] == list(WIDTHS)
    assert {case["target"] for case in cases} == {"sm90"}
    pairs = {(case["dtype"], case["options"]) for case in cases}
    assert pairs == set(itertools.product([DTYPES["bf16"], DTYPES["fp16"]], OPTION_SETS))


def test_three_products_come_on_every_target_that_takes_them_and_are_taken_there():
    cases = list(in_tf32x3(["packed_attention", "masked_attention"]))
    assert {case.like.precision for case in cases} == {"tf32x3"}
    taken = set()
    for case in cases:
        target = {"sm120": "sm86"}.get(case.target, case.target)
        config = look_up("forward", target, case.like.head_width, case.like.dtype, precision="tf32x3")
        taken |= {case.target} if config.precision == "tf32x3" else set()
    assert taken == {case.target for case in cases} == set(TARGETS) - {"sm100"}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_a_kind_are_what_it_says_and_are_drawn_again(kind):
    like = Shape((50,), head_width=48)
    shapes = list(random_shapes(kind, like, 50, "seed", most=8))
    assert shapes == list(random_shapes(kind, like, 50, "seed", most=8))
    assert all(shape.head_width == 48 and 1 <= shape.queries <= 16 and max(shape.lengths) > 0 for shape in shapes)
    assert all(len(shape.lengths) <= 9 for shape in shapes)
    lengths = [shape.lengths for shape in shapes]
    holds = {
        "one sequence": lambda x: len(x) == 1 and x[0] > 1,
        "one of everything": lambda x: x == (1,),
        "multiples of sixteen": lambda x: len(x) == 1 and x[0] % 16 == 0,
        "equal sequences": lambda x: len(x) > 1 and len(set(x)) == 1,
        "several sequences": lambda x: len(x) > 1,
    }
    assert all(holds[kind](x) for x in lengths)
    if kind != "one of everything":
        assert len(set(lengths)) > 3


def test_attention_is_called_with_a_long_sequence_too():
    like = Shape((50,), head_width=72)
    assert [shape.lengths for shape in long_one("packed_attention_in_gluon", like)] == [(SHORT_BELOW + 8,)]
    assert long_one("readout", like) == []
