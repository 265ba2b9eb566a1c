"""The list of methods: each has the common interface, and readers of the list agree with it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_vits import random_vit, sample

from maskattn.explain import METHODS, Explainer
from maskattn.explain.methods import DEFAULT_METHOD, method_named

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"rise": {"m": 20}}
of_every_method = pytest.mark.parametrize("name", METHODS)


def attribute(name, model, *arguments):
    if METHODS[name].module.endswith("baselines") and importlib.util.find_spec("captum") is None:
        pytest.skip("captum is not installed")
    explainer = METHODS[name](model, **QUICK.get(name, {}))
    return explainer, explainer.attribute(*arguments, generator=torch.Generator().manual_seed(0))


@of_every_method
@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}], ids=str)
def test_every_method_gives_signed_maps_of_tissue_through_the_one_interface(name, variant):
    model, (x, keep) = random_vit(**variant).float(), sample()
    if METHODS[name].class_token_alone and variant:
        with pytest.raises(ValueError, match="global_pool"):
            attribute(name, model, x.float(), "all", keep)
        return
    explainer, maps = attribute(name, model, x.float(), "all", keep)
    assert isinstance(explainer, Explainer)
    assert maps.shape == (2, 4, 4, 4)
    assert maps.isfinite().all()
    assert not maps.requires_grad
    assert (maps.movedim(1, 3)[~keep] == 0).all()
    assert (maps != 0).any()


@of_every_method
def test_every_method_is_called_as_captum_calls(name):
    model, (x, keep) = random_vit().float(), sample()
    _, maps = attribute(name, model, x.float(), 1, keep)
    explainer = METHODS[name](model, **QUICK.get(name, {}))
    (same,) = explainer.attribute(
        (x.float(),), target=1, additional_forward_args=keep, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(maps, same)
    assert explainer.forward_func is model
    assert not explainer.has_convergence_delta()


@of_every_method
def test_a_method_draws_at_random_if_and_only_if_the_list_says_so(name):
    model, (x, keep) = random_vit().float(), sample()
    explainer, maps = attribute(name, model, x.float(), 1, keep)
    other = explainer.attribute(x.float(), 1, keep, generator=torch.Generator().manual_seed(1))
    assert torch.equal(maps, other) != METHODS[name].draws


@of_every_method
def test_a_gap_comes_from_methods_that_have_one_and_is_refused_elsewhere(name):
    model, (x, keep) = random_vit(), sample()
    explainer, maps = attribute(name, model, x, "all", keep)
    if not METHODS[name].complete:
        with pytest.raises(ValueError, match="convergence gap"):
            explainer.attribute(x, "all", keep, return_convergence_gap=True)
    else:
        same, gap = explainer.attribute(x, "all", keep, return_convergence_gap=True)
        torch.testing.assert_close(same, maps)
        assert gap.shape == (2, 4)


def test_names_and_titles_are_distinct_and_the_default_is_one_of_them():
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert all(name == method.name for name, method in METHODS.items())
    assert DEFAULT_METHOD in METHODS
    assert not METHODS[DEFAULT_METHOD].compared
    with pytest.raises(ValueError, match=r"one of cdam, .*, got method='lime'"):
        method_named("lime")


def test_the_list_is_read_without_torch():
    code = "import sys, maskattn.explain.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_page_of_methods_holds_the_list():
    rows = [f"| `{method.name}` | {method.title} | {method.what} |" for method in METHODS.values()]
    text = (ROOT / "docs" / "methods.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows
    assert f"`{DEFAULT_METHOD}` is the default" in text


def test_pages_name_only_methods_that_there_are():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"--method[ =]([a-z][a-z-]*)", page.read_text()):
            assert name in METHODS, f"{page.name} names the method {name}"


def test_the_table_of_methods_is_judged_by_title():
    pytest.importorskip("captum")
    from bench.evidence.explanations import methods

    assert list(methods(random_vit())) == [method.title for method in METHODS.values()]
