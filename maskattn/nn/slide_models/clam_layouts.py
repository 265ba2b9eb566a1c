"""The layouts of CLAM's checkpoints, and of AttentionDeepMIL's, whose pooling CLAM's is: read from CLAM 53e2409."""

from __future__ import annotations

import re

import torch

from maskattn.nn.slide_models.best_instance import BestInstanceHead
from maskattn.nn.slide_models.checkpoint import Checkpoint, HeadFile, filled
from maskattn.nn.slide_models.gated_attention import GatedAttentionHead

__all__ = ["read_best_instance", "read_clam", "read_deep_mil"]


def read_clam(given: Checkpoint) -> HeadFile:
    """CLAM_SB, CLAM_MB: the attention is at 3, or at 2 where an earlier version trained without dropout."""
    state = {
        key.replace("attention_net.module.", "attention_net."): x  # spread over several GPUs, it was wrapped
        for key, x in given.state.items()
        if "instance_loss_fn" not in key
    }
    at = next(
        (key.split(".")[1] for key in state if re.search(r"^attention_net\.\d+\.(attention_c|module)\.", key)), ""
    )
    state = {re.sub(rf"^attention_net\.{at}\.", "attention_net.3.", key) if at else key: x for key, x in state.items()}
    # Without dropout the last layer of the plain attention moves up too.
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
    """MIL_fc and MIL_fc_mc; earlier versions had MIL_fc's layers in one list, and a linear layer for each class."""
    state = {re.sub(r"\.module\.", ".", key): x for key, x in given.state.items()}  # as spread over several GPUs
    if any(key.startswith("classifier.0.") for key in state):
        last = max(int(key.split(".")[1]) for key in state if re.match(r"classifier\.\d+\.", key))
        state = {key.replace("classifier.0.", "fc.0."): x for key, x in state.items()}
        state = {key.replace(f"classifier.{last}.", "classifiers."): x for key, x in state.items()}
    layout = "MIL_fc_mc" if any(key.startswith("classifiers.") for key in given.state) else "MIL_fc"
    state = {re.sub(r"^classifier\.", "classifiers.", key): x for key, x in state.items()}
    apart = sorted({int(key.split(".")[1]) for key in state if re.match(r"classifiers\.\d+\.", key)})
    for end in ("weight", "bias") if apart else ():
        rows = [state.pop(f"classifiers.{c}.{end}", None) for c in apart]
        if all(row is not None for row in rows):
            state[f"classifiers.{end}"] = torch.cat([row for row in rows if row is not None])
    checked = Checkpoint(given.name, state, {}, {})
    head = BestInstanceHead(
        checked.width("fc.0.weight", 1), checked.width("classifiers.weight"), checked.width("fc.0.weight")
    )
    return HeadFile(filled(head, state, layout, given.name), layout)


def read_deep_mil(given: Checkpoint) -> HeadFile:
    """AttentionDeepMIL's gated attention over features as they are; its one logit is that of the second class."""
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
        part, _, end = key.rpartition(".")
        state[f"{names.get(part, part)}.{end}"] = x
    for end in ("weight", "bias"):
        last = state.get(f"classifiers.{end}")
        if last is not None and len(last) == 1:
            state[f"classifiers.{end}"] = torch.cat([torch.zeros_like(last), last])
    head = GatedAttentionHead(
        given.width("attention_V.0.weight", 1),
        int(state["classifiers.weight"].shape[0]) if "classifiers.weight" in state else 2,
        hidden=None,
        attention_dim=given.width("attention_V.0.weight"),
        gate=gate,
    )
    return HeadFile(filled(head, state, "AttentionDeepMIL", given.name), "AttentionDeepMIL")
