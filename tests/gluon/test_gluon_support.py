"""impl="gluon" runs what it says and refuses all else by name, and nothing else is run in its place."""

from __future__ import annotations

import inspect

import pytest
import torch
import triton
from simulated_launch import simulating

import maskattn
from maskattn.attention.implementation import IMPLS, choose, implementation
from maskattn.doctor import try_attention
from maskattn.kernels.gluon import support
from maskattn.kernels.tables import lookup
from maskattn.options import Options

Q = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
ENDS = torch.tensor([0, 4], dtype=torch.int32)


def test_it_runs_half_precision_of_every_head_width_of_the_kernels_on_hopper():
    with simulating():
        for head_width in range(16, 257, 8):
            for dtype in (torch.float16, torch.bfloat16):
                assert support.supports(torch.zeros(3, 2, head_width, dtype=dtype), Options(1.0)) is None


@pytest.mark.parametrize(
    ("q", "options", "reason"),
    [
        (Q.float(), {}, r"needs float16 or bfloat16, got q\.dtype=torch\.float32"),
        (Q[None], {}, r"computes only packed_attention, got queries of shape \(1, 4, 2, 64\)"),
        (Q[..., :12], {}, "needs a head width of 16 to 256 in steps of 8, got D=12"),
        (Q, {"dropout_p": 0.1, "dropout_seed": ENDS[:1].long()}, r"has no dropout, got dropout_p=0\.1"),
    ],
    ids=["dtype", "operation", "width", "dropout"],
)
def test_what_it_cannot_run_is_refused_by_name(q, options, reason):
    with simulating(), pytest.raises(ValueError, match=f"impl='gluon' {reason}"):
        choose("gluon", q, Options(1.0, **options))


def test_other_devices_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="impl='gluon' needs a CUDA or ROCm GPU"):
        maskattn.packed_attention(Q, Q, Q, ENDS, ENDS, 4, 4, impl="gluon")
    with simulating():
        monkeypatch.setattr(lookup, "target_of", lambda device: "sm100")
        with pytest.raises(
            ValueError, match=r"needs a GPU of compute capability 9\.0, got one that is treated as sm100"
        ):
            maskattn.packed_attention(Q, Q, Q, ENDS, ENDS, 4, 4, impl="gluon")


def test_an_older_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    with simulating(), pytest.raises(ValueError, match=r"impl='gluon' needs triton 3\.7 or later, got triton 3\.6\.0"):
        choose("gluon", Q, Options(1.0))


@pytest.mark.parametrize("operation", ["masked_attention", "readout"])
def test_other_operations_are_refused_and_not_run_by_others(operation):
    dense, keep = Q.view(1, 4, 2, 64).transpose(1, 2), torch.ones(1, 4, dtype=torch.bool)
    calls = {
        "masked_attention": lambda: maskattn.masked_attention(dense, dense, dense, keep, impl="gluon"),
        "readout": lambda: maskattn.readout(Q[None, :1], Q, Q, ENDS, 4, impl="gluon"),
    }
    with simulating(), pytest.raises(ValueError, match="impl='gluon' computes only packed_attention"):
        calls[operation]()


def test_every_function_of_another_operation_refuses():
    gluon = implementation("gluon")
    for function in (gluon.masked_forward, gluon.masked_backward, gluon.readout_forward, gluon.readout_backward):
        with pytest.raises(ValueError, match=r"computes only packed_attention, got (masked_attention|readout);"):
            function(*[None] * len(inspect.signature(function).parameters))
    with pytest.raises(ValueError, match="computes only packed_attention, got token_relevance"):
        gluon.token_relevance(*[None] * 5)


def test_the_doctor_tries_it():
    with simulating():
        assert "runs; differs from the reference by" in try_attention("gluon", "cpu")


def test_it_is_chosen_by_name_only():
    assert "gluon" in IMPLS
    with simulating():
        assert choose(None, Q, Options(1.0)) != "gluon"
        assert choose("gluon", Q, Options(1.0)) == "gluon"
