"""Without a GPU, but with Triton's own launcher: every launch of every call compiles, and there are few of them."""

from __future__ import annotations

import collections
import functools
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.aot.every_call import ON_HOPPER, OPERATIONS, Shape, launches_of  # noqa: E402 (an interpreter skips before)
from maskattn.attention.impl import triton as in_triton  # noqa: E402 (an interpreter skips before)
from maskattn.kernels.attention import masked  # noqa: E402 (an interpreter skips before)
from maskattn.kernels.tables import lookup  # noqa: E402 (an interpreter skips before)

# Where a number is 1 or a multiple of 16 the launcher compiles anew, with the number or the factor known.
SHAPES = {
    "one of everything": Shape((1,)),
    "one sequence": Shape((50,)),
    "multiples of sixteen": Shape((48,), queries=16, dtype=torch.float32),
    "several sequences": Shape((5, 0, 12), queries=3, head_width=40, shared_bias=True),
}


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_numbers_the_launcher_takes_for_constants_the_kernels_compile(operation, target):
    shapes = [replace(shape, options=options) for shape in SHAPES.values() for options in (False, True)]
    compilations = {launch.name + launch.key: launch for launch in launches_of(operation, shapes, target)}
    assert compilations
    for launch in compilations.values():
        assert "tt.func public" in launch.intermediate_code()


# Of one kernel, for one operation and head shape: a stride that grows with the tokens may be 1 or a multiple of 16 or
# neither, there is a schedule or none, and ``clear_tail_kernel`` follows three kernels.
OF_ATTENTION = dict.fromkeys(
    ("forward_kernel", "gluon_forward_kernel", "query_gradient_kernel", "key_gradient_kernel"), 5
)
AT_MOST = {**OF_ATTENTION, "readout_gradient_kernel": 3, "clear_tail_kernel": 7}


def compilations_of(operation: str, shapes: list[Shape]) -> dict[str, int]:
    keys = collections.defaultdict(set)
    for launch in launches_of(operation, shapes, "sm90"):
        keys[launch.name].add(launch.key)
    return {name: len(of_kernel) for name, of_kernel in keys.items()}


def random_lengths(generator: torch.Generator, longest: int) -> tuple[int, ...]:
    batch = int(torch.randint(1, 40, (), generator=generator))
    return tuple(torch.randint(1, longest, (batch,), generator=generator).tolist())


@pytest.mark.parametrize("options", [{}, {"options": True}, {"options": True, "shared_bias": True}], ids=str)
@pytest.mark.parametrize("operation", [*OPERATIONS, *ON_HOPPER])
def test_lengths_and_sequences_may_vary_without_new_compilations(operation, options):
    generator = torch.Generator().manual_seed(0)
    shapes = [Shape(random_lengths(generator, 70), **options) for _ in range(200)]
    shapes += [Shape((1,), **options), Shape((16,) * 16, **options)]
    counts = compilations_of(operation, shapes)
    assert {name: count for name, count in counts.items() if count > AT_MOST.get(name, 2)} == {}


@pytest.mark.parametrize("operation", ["readout", "readout_with_rows", "relevance", "relevance_of_one_class"])
def test_one_query_and_several_are_compiled_apart(operation):
    one, several = (
        compilations_of(operation, [Shape((50, 7), queries) for queries in numbers]) for numbers in ((1,), range(1, 17))
    )
    # The loop over the queries of relevance has a known end, since one that is not known spills registers.
    most = {name: 16 if name == "relevance_kernel" else 2 * count for name, count in one.items()}
    assert {name: count for name, count in several.items() if count > most[name]} == {}


@pytest.mark.parametrize("target", ["sm90", "sm100"])
@pytest.mark.parametrize("operation", ["packed_attention", "masked_attention"])
def test_short_and_long_sequences_are_two_kinds_however_many_lengths_there_are(operation, target, monkeypatch):
    # A bound in the middle of the lengths, which are quicker to make than those on both sides of the real one.
    monkeypatch.setattr(lookup, "SHORT_BELOW", 40)
    generator = torch.Generator().manual_seed(0)
    shapes = [Shape(random_lengths(generator, longest), head_width=64) for longest in (40, 70) for _ in range(100)]
    kinds, keys = collections.defaultdict(set), collections.defaultdict(set)
    for launch in launches_of(operation, shapes, target):
        names = launch.constants_by_name
        kinds[launch.name].add((names.get("DESCRIBED"), names.get("TAIL_STAGES")))
        keys[launch.name].add(launch.key)
    for kernel in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        # Rows by index have no descriptors, so that theirs may differ in nothing.
        assert len(kinds[kernel]) == 2 or (operation == "masked_attention" and len(kinds[kernel]) == 1)
        assert len(keys[kernel]) <= 7


def test_neither_do_lengths_of_rows_that_are_moved(monkeypatch):
    # The public operation moves the rows of long sequences alone, and two hundred of these would take hours.
    for home, name in ((masked, "masked_forward"), (in_triton, "masked_backward")):
        monkeypatch.setattr(home, name, functools.partial(getattr(home, name), moved_from=0))
    generator = torch.Generator().manual_seed(0)
    counts = compilations_of("masked_attention", [Shape(random_lengths(generator, 70)) for _ in range(200)])
    # To the front and back again.
    assert 1 <= counts["move_kernel"] <= 2
