"""Launches by the C function of Triton's launcher: when they are possible, on which device, with which arguments."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from maskattn.kernels.launch import direct  # noqa: E402 (it imports triton, which may be absent)


class Driver:
    """The part of Triton's driver that a launch asks; device 0 is current, and stream 70 + n that of device n."""

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 70 + device


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


class Annotation(NamedTuple):
    """Triton's own is written in C and takes the same arguments."""

    nested_tuple: object
    type: int


# Of (x, (y, z), n), where z is known at compile time; the signature has a byte for each of the others.
TYPES = {"x": "*bf16", "pair": ("i32", "constexpr"), "n": "i64"}
NESTED = [Annotation(None, 1), Annotation([Annotation(None, 1), Annotation(None, 0)], 2), Annotation(None, 1)]
FLAT = [Annotation(None, 1)] * 3


def compiled_kernel(launched: list, **changes: object) -> SimpleNamespace:
    run = {
        "launch": lambda *given: launched.append(given),
        "arg_annotations": NESTED,
        "kernel_signature": b"abc",
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "num_ctas": 1,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }
    run = {name: value for name, value in (run | changes).items() if value is not None}
    source = SimpleNamespace(signature=TYPES)
    return SimpleNamespace(run=SimpleNamespace(**run), src=source, function=5, packed_metadata=(4, 1, 0))


def test_a_launch_has_those_arguments_of_tritons_launcher_that_are_passed_at_run_time():
    launched: list = []
    launch = direct.direct_launch(compiled_kernel(launched), 3)
    arguments = tuple(launch.run_time(("x", ("y", "known"), 7)))
    assert arguments == ("x", "y", 7)
    launch(9, torch.zeros(2), arguments)
    end = None, None, None, None, None, FLAT, b"abc", arguments
    assert launched == [(3, 1, 1, 9, 5, False, False, (4, 1, 0), *end)]


def test_memory_for_descriptors_is_that_of_every_program():
    sizes, launched, empty = [], [], torch.empty
    launch = direct.direct_launch(compiled_kernel(launched, global_scratch_size=256), 3)
    assert launch.scratch_bytes == 3 * 256
    with mock.patch.object(torch, "empty", lambda size, **given: sizes.append(size) or empty(size, **given)):
        launch(9, torch.zeros(2), ())
    launch.launch(9, (), 4096)
    assert sizes == [3 * 256]
    assert isinstance(launched[0][11], int)
    assert launched[1][11] == 4096


@pytest.mark.parametrize(
    "change", [{"arg_annotations": None}, {"launch": None}, {"profile_scratch_size": 64}, {"kernel_signature": b"ab"}]
)
def test_launchers_of_another_form_are_left_to_triton(change):
    assert direct.direct_launch(compiled_kernel([], **change), 3) is None


@pytest.mark.parametrize(("index", "switched"), [(-1, 0), (0, 0), (1, 1)])
def test_the_device_of_the_tensors_is_made_current_if_it_is_not(index, switched):
    switch = mock.patch.object(torch.cuda, "device_of", return_value=nullcontext())
    with switch as device_of, direct.on_device_of(torch.zeros(2), (index, 9)):
        pass
    assert device_of.call_count == switched


def test_the_stream_is_the_current_one_of_the_tensors_device():
    assert direct.place_of(torch.zeros(1)) == (-1, 70)
    on_a_gpu = SimpleNamespace(get_device=lambda: 1)
    assert direct.place_of(on_a_gpu) == (1, 71)


def test_hooks_of_a_profiler_are_noticed():
    hook = triton.knobs.runtime.launch_exit_hook
    assert not direct.hooked()
    hook.add(print)
    try:
        assert direct.hooked()
    finally:
        hook.remove(print)
    assert not direct.hooked()
