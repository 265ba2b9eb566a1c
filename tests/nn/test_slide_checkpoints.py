"""Checkpoint files of slide models: none of their code runs, and what does not fit is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from slide_checkpoints import CASES, C, clam, stamp_mlp, stamp_vit, tiles, titan

from maskattn.nn.slide_models.head import TileGrid
from maskattn.nn.slide_models.layouts import head_from_checkpoint, load_slide_head
from maskattn.nn.slide_models.reading import Unread, read_checkpoint

RAN: list[str] = []


def run_me(what: str) -> str:
    RAN.append(what)
    return what


class Trained:
    """A class of a training program."""

    def __init__(self) -> None:
        self.values = [1, 2]

    def __setstate__(self, state: dict) -> None:
        RAN.append("setstate")


class Calls:
    """An object that runs a function when it is unpickled."""

    def __reduce__(self) -> tuple:
        return run_me, ("on reading",)


@pytest.fixture(autouse=True)
def nothing_runs():
    RAN.clear()
    yield
    assert RAN == []


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_what_its_checkpoint_gives(name, tmp_path):
    case, (z, um, cells) = CASES[name](), tiles()
    torch.save(case.checkpoint, tmp_path / "s_0_checkpoint.pt")
    head = load_slide_head(tmp_path / "s_0_checkpoint.pt", **case.options).head
    grid = TileGrid(cells[:, 1], cells[:, 0], (6, 7))
    assert torch.equal(head(z, um, grid), head_from_checkpoint(case.checkpoint, **case.options).head(z, um, grid))


def test_what_a_training_program_pickled_beside_the_weights_is_neither_imported_nor_run(tmp_path):
    case = stamp_vit(alibi=False)
    case.checkpoint["hyper_parameters"] |= {
        "model_class": Trained,
        "stamp_version": Trained(),
        "out": Path("somewhere"),
        "more": {"nested": [Calls(), Trained()]},
        "train_patients": {"one", "two"},
    }
    torch.save(case.checkpoint, tmp_path / "model.ckpt")
    found = load_slide_head(tmp_path / "model.ckpt")
    assert found.classes == ("low", "middle", "high")
    assert found.facts == {"label": "grade", "model": "vit"}
    hyper = read_checkpoint(tmp_path / "model.ckpt")["hyper_parameters"]
    assert isinstance(hyper["stamp_version"], Unread)
    assert hyper["stamp_version"].of.endswith(".Trained")
    assert hyper["train_patients"] == {"one", "two"}


def test_torchs_older_file_format_is_read_too(tmp_path):
    case = clam(branches=False)
    torch.save(case.checkpoint, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_slide_head(tmp_path / "old.pt").layout == "CLAM_SB"


def test_a_pickled_model_is_refused_and_not_run(tmp_path):
    torch.save(Trained(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"pickled .*Trained in .*only by running code in it; save model\.state"):
        load_slide_head(tmp_path / "model.pt")
    (tmp_path / "call.pt").write_bytes(pickle.dumps(Calls()))
    with pytest.raises(ValueError, match=r"must be a file that torch\.save wrote"):
        load_slide_head(tmp_path / "call.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="a pickled list"):
        load_slide_head(tmp_path / "list.pt")


def test_files_that_are_not_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.pt"):
        load_slide_head(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"must be a file that torch\.save wrote, got .*text\.pt"):
        load_slide_head(tmp_path / "text.pt")
    (tmp_path / "half.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="must be complete"):
        load_slide_head(tmp_path / "half.safetensors")
    torch.save({"conv1.weight": torch.zeros(2), "fc9.bias": torch.zeros(1)}, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"one of CLAM, .* got keys conv1\.weight, fc9\.bias in .*resnet\.pt"):
        load_slide_head(tmp_path / "resnet.pt")
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="got keys no tensors"):
        load_slide_head(tmp_path / "empty.pt")


def test_keys_and_shapes_that_do_not_fit_are_named():
    state = clam(branches=False).checkpoint
    state["attention_net.3.attention_b.0.weight"] = torch.zeros(8, 15)
    state["attention_net.7.weight"] = torch.zeros(1)
    del state["classifiers.bias"]
    with pytest.raises(
        ValueError,
        match=r"layout of CLAM_SB: it has no classifiers\.bias; attention_net\.7\.weight has no place; "
        r"attention_net\.3\.attention_b\.0\.weight is \(8, 15\) instead of \(8, 16\)",
    ):
        head_from_checkpoint(state)
    with pytest.raises(ValueError, match=r"must have the key attention_net\.0\.weight"):
        head_from_checkpoint(
            {"attention_net.3.attention_c.weight": torch.zeros(1, 8), "classifiers.weight": state["classifiers.weight"]}
        )
    case = stamp_vit(alibi=False)
    del case.checkpoint["state_dict"]["model.transformer.layers.1.1.4.bias"]
    with pytest.raises(ValueError, match=r"it has no blocks\.1\.mlp\.fc2\.bias"):
        head_from_checkpoint(case.checkpoint)


def test_models_of_another_kind_are_refused_with_what_they_do():
    case = stamp_mlp()
    case.checkpoint["hyper_parameters"]["task"] = "survival"
    with pytest.raises(ValueError, match="STAMP's task 'survival' on 'tile' features"):
        head_from_checkpoint(case.checkpoint)
    case.checkpoint["hyper_parameters"] |= {"task": "classification", "supported_features": "patient"}
    with pytest.raises(ValueError, match="on 'patient' features"):
        head_from_checkpoint(case.checkpoint)
    case.checkpoint["hyper_parameters"] |= {"supported_features": "tile", "categories": ["one"]}
    with pytest.raises(ValueError, match="got 1 categories, one, for 3 outputs"):
        head_from_checkpoint(case.checkpoint)
    with pytest.raises(ValueError, match="got HIPT's region transformer"):
        head_from_checkpoint({"vit_region.cls_token": torch.zeros(2, C)})
    state = titan("parallel").checkpoint
    with pytest.raises(ValueError, match=r"one linear head \(mlp\.0\), got none"):
        head_from_checkpoint({key: x for key, x in state.items() if not key.startswith("mlp.")})
    case = CASES["Prov-GigaPath, two layers"]()
    with pytest.raises(ValueError, match=r"48 channels of each of its layers \(feat_layer\), got 96 channels"):
        head_from_checkpoint(case.checkpoint, num_heads=4, layers=(3,))
    with pytest.raises(ValueError, match=r"numbers from 0 to 3, the encoder's depth, got \[11\]"):
        head_from_checkpoint(CASES["Prov-GigaPath"]().checkpoint, num_heads=4)
