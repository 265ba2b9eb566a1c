"""Readers of CLAM's checkpoints, as of CLAM 53e2409, and of AttentionDeepMIL's, which has the same pooling."""

from __future__ import annotations

import re

import torch

from maskattn.nn.slide_models.best_instance import BestInstanceHead
from maskattn.nn.slide_models.checkpoint import Checkpoint, HeadFile, filled
from maskattn.nn.slide_models.gated_attention import GatedAttentionHead

__all__ = ["read_best_instance", "read_clam", "read_deep_mil"]


def read_clam(given: Checkpoint) -> HeadFile:
    """Read CLAM_SB and CLAM_MB.

    The attention is layer 3 of ``attention_net``, or layer 2 in earlier versions trained without dropout.
    """
    state = {
        key.replace("attention_net.module.", "attention_net."): x  # the wrapper of training on several GPUs
        for key, x in given.state.items()
        if "instance_loss_fn" not in key
    }
    index = next(
        (key.split(".")[1] for key in state if re.search(r"^attention_net\.\d+\.(attention_c|module)\.", key)), ""
    )
    if index:
        state = {re.sub(rf"^attention_net\.{index}\.", "attention_net.3.", key): x for key, x in state.items()}
    # Without dropout the last layer of ungated attention has a smaller index too.
    gate = any(".attention_c." in key for key in state)
    if not gate:
        state = {key.replace("attention_net.3.module.2.", "attention_net.3.module.3."): x for key, x in state.items()}
    checked = Checkpoint(given.name, state, {}, {})
    branches = any(key.startswith("classifiers.0.") for key in state)
    classes = len({key.split(".")[1] for key in state if re.match(r"classifiers\.\d+\.", key)})
    head = GatedAttentionHead(
        checked.width("attention_net.0.weight", 1),
        classes if branches else checked.width("classifiers.weight"),
        hidden=checked.width("attention_net.0.weight"),
        attention_dim=checked.width(
            "attention_net.3.attention_a.0.weight" if gate else "attention_net.3.module.0.weight"
        ),
        branch_per_class=branches,
        gate=gate,
        instances=any(key.startswith("instance_classifiers.") for key in state),
    )
    layout = "CLAM_MB" if branches else "CLAM_SB"
    return HeadFile(filled(head, state, layout, given.name), layout)


def read_best_instance(given: Checkpoint) -> HeadFile:
    """Read MIL_fc and MIL_fc_mc.

    Earlier versions keep all layers of MIL_fc in one list, and one linear layer per class in MIL_fc_mc.
    """
    state = {re.sub(r"\.module\.", ".", key): x for key, x in given.state.items()}  # the wrapper of several GPUs
    if any(key.startswith("classifier.0.") for key in state):
        last = max(int(key.split(".")[1]) for key in state if re.match(r"classifier\.\d+\.", key))
        state = {key.replace("classifier.0.", "fc.0."): x for key, x in state.items()}
        state = {key.replace(f"classifier.{last}.", "classifiers."): x for key, x in state.items()}
    layout = "MIL_fc_mc" if any(key.startswith("classifiers.") for key in given.state) else "MIL_fc"
    state = {re.sub(r"^classifier\.", "classifiers.", key): x for key, x in state.items()}
    classes = sorted({int(key.split(".")[1]) for key in state if re.match(r"classifiers\.\d+\.", key)})
    for suffix in ("weight", "bias") if classes else ():
        rows = [state.pop(f"classifiers.{c}.{suffix}", None) for c in classes]
        if all(row is not None for row in rows):
            state[f"classifiers.{suffix}"] = torch.cat([row for row in rows if row is not None])
    checked = Checkpoint(given.name, state, {}, {})
    head = BestInstanceHead(
        checked.width("fc.0.weight", 1), checked.width("classifiers.weight"), checked.width("fc.0.weight")
    )
    return HeadFile(filled(head, state, layout, given.name), layout)


def read_deep_mil(given: Checkpoint) -> HeadFile:
    """Read AttentionDeepMIL's attention over the unprojected features; its single logit is that of the second class."""
    names = {
        "attention_V.0": "attention_net.3.attention_a.0",
        "attention_U.0": "attention_net.3.attention_b.0",
        "attention_w": "attention_net.3.attention_c",
        "classifier.0": "classifiers",
        "classifier": "classifiers",
    }
    gate = any(key.startswith("attention_U.") for key in given.state)
    if not gate:
        names |= {"attention_V.0": "attention_net.3.module.0", "attention_w": "attention_net.3.module.3"}
    state = {}
    for key, x in given.state.items():
        layer, _, suffix = key.rpartition(".")
        state[f"{names.get(layer, layer)}.{suffix}"] = x
    for suffix in ("weight", "bias"):
        last = state.get(f"classifiers.{suffix}")
        if last is not None and len(last) == 1:
            state[f"classifiers.{suffix}"] = torch.cat([torch.zeros_like(last), last])
    head = GatedAttentionHead(
        given.width("attention_V.0.weight", 1),
        int(state["classifiers.weight"].shape[0]) if "classifiers.weight" in state else 2,
        hidden=None,
        attention_dim=given.width("attention_V.0.weight"),
        gate=gate,
    )
    return HeadFile(filled(head, state, "AttentionDeepMIL", given.name), "AttentionDeepMIL")
