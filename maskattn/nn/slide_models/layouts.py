"""Recognition of other tools' slide model checkpoints by their keys, and their conversion into heads.

Supported are CLAM (``s_k_checkpoint.pt``: CLAM_SB, CLAM_MB, MIL_fc, MIL_fc_mc), AttentionDeepMIL, TransMIL, STAMP 2's
Lightning checkpoints (vit, trans_mil, mlp, linear), TITAN and Prov-GigaPath with the linear head of their fine-tuning,
and the slide level of HIPT and soma.

Dimension key: C width of the embeddings, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from maskattn.nn.adapters.conversion import UnsupportedModelError, build
from maskattn.nn.slide_encoders import from_gigapath, from_titan
from maskattn.nn.slide_models.checkpoint import MOST_NAMED, Checkpoint, HeadFile, filled
from maskattn.nn.slide_models.clam_layouts import read_best_instance, read_clam, read_deep_mil
from maskattn.nn.slide_models.gigapath import GigaPathHead
from maskattn.nn.slide_models.head import SlideHead
from maskattn.nn.slide_models.hipt import HIPTHead
from maskattn.nn.slide_models.pooling import PooledHead
from maskattn.nn.slide_models.reading import Unread, read_checkpoint, tensors_of
from maskattn.nn.slide_models.stamp import DistanceViTHead
from maskattn.nn.slide_models.titan import TitanHead
from maskattn.nn.slide_models.transmil import TransMILHead
from maskattn.nn.slide_models.vit import ViTHead

__all__ = ["HeadFile", "head_from_checkpoint", "load_slide_head"]


def load_slide_head(path: str | Path, **options: Any) -> HeadFile:
    """Load a slide model's head from another tool's checkpoint, without running code in it.

    Args:
        path: the checkpoint.
        options: facts that the tensors do not contain. ``num_heads``: default 12 for TITAN, 16 for GigaPath, 3 for
            HIPT, and the checkpoint's value or 8 for STAMP; ``layers``: GigaPath's ``feat_layer``, default (11,);
            ``global_pool``: GigaPath's pooling, default "token"; ``pool``: TITAN's, "parallel" (default) or "cascade";
            ``impl``: implementation of the attention.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the layout is unknown, or keys or shapes do not match it; the message lists them.
    """
    return head_from_checkpoint(read_checkpoint(path), name=str(path), **options)


def head_from_checkpoint(checkpoint: Mapping[str, Any], *, name: str = "the checkpoint", **options: Any) -> HeadFile:
    """Return the head in a loaded checkpoint; options and errors are those of :func:`load_slide_head`."""
    hyper = checkpoint.get("hyper_parameters")
    state = tensors_of(checkpoint)
    if any(key.startswith("model.") for key in state) and not any("vision_encoder." in key for key in state):
        # A Lightning module stores the network under ``model``; metrics and loss weights have other keys.
        state = {key.removeprefix("model."): x for key, x in state.items() if key.startswith("model.")}
    given = Checkpoint(name, state, hyper if isinstance(hyper, Mapping) else {}, options)
    for known, read in _LAYOUTS:
        if any(re.search(known, key) for key in state):
            found = read(given)
            return HeadFile(found.head.eval(), found.layout, found.classes, found.facts)
    shown = ", ".join(sorted(state)[:MOST_NAMED]) or "no tensors"
    raise UnsupportedModelError(
        "a slide model's checkpoint must be one of CLAM, AttentionDeepMIL, TransMIL, STAMP, TITAN, Prov-GigaPath or "
        f"HIPT, got keys {shown}{', ...' if len(state) > MOST_NAMED else ''} in {name}; build its head in Python "
        "(maskattn.nn.SlideHead) and save it as a folder"
    )


def _transmil(given: Checkpoint) -> HeadFile:
    head = TransMILHead(given.width("_fc1.0.weight", 1), given.width("_fc2.weight"), given.width("_fc1.0.weight"))
    return _of_stamp(given, filled(head, given.state, "TransMIL", given.name), "TransMIL")


def _stamp_vit(given: Checkpoint) -> HeadFile:
    """Read STAMP's transformer: with ALiBi into :class:`DistanceViTHead`, without into :class:`ViTHead`."""
    state = given.state
    dim, in_dim, classes = (
        given.width("class_token"),
        given.width("project_features.0.weight", 1),
        given.width("mlp_head.0.weight"),
    )
    depth = len({key.split(".")[2] for key in state if key.startswith("transformer.layers.")})
    hidden = given.width("transformer.layers.0.1.1.weight")
    if any(".mhsa.query_encoders." in key for key in state):
        heads = len({key.split(".")[6] for key in state if ".0.0.mhsa.query_encoders." in key})
        head: SlideHead = DistanceViTHead(in_dim, classes, dim, depth, heads, hidden)
        return _of_stamp(given, filled(head, state, "STAMP's vit with ALiBi", given.name), "STAMP vit, ALiBi")
    arguments = {
        "img_size": 1,
        "patch_size": 1,
        "in_chans": in_dim,
        "num_classes": classes,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": int(given.options.get("num_heads") or given.hyper.get("n_heads", 8)),
        "mlp_ratio": (hidden + 0.5) / dim,
        "pos_embed": "none",
        "embed_act": "gelu",
        "norm_eps": 1e-5,
    }
    renamed = _renamed_from_stamp(state)
    vit = build(given.name, arguments, renamed, impl=given.options.get("impl"))
    return _of_stamp(given, ViTHead(vit), "STAMP vit")


def _renamed_from_stamp(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, x in state.items():
        for pattern, ours in _STAMP:
            key, found = pattern.subn(ours, key)
            if found:
                break
        if key == "cls_token":
            x = x[None, None]
        elif key == "patch_embed.proj.weight":
            x = x[:, :, None, None]
        renamed[key] = x
    return renamed


_STAMP = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^class_token$", "cls_token"),
        (r"^project_features\.0\.", "patch_embed.proj."),
        (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
        (r"^transformer\.layers\.(\d+)\.0\.mhsa\.in_proj_", r"blocks.\1.attn.qkv."),
        (r"^transformer\.layers\.(\d+)\.0\.mhsa\.out_proj\.", r"blocks.\1.attn.proj."),
        (r"^transformer\.layers\.(\d+)\.1\.0\.", r"blocks.\1.norm2."),
        (r"^transformer\.layers\.(\d+)\.1\.1\.", r"blocks.\1.mlp.fc1."),
        (r"^transformer\.layers\.(\d+)\.1\.4\.", r"blocks.\1.mlp.fc2."),
        (r"^transformer\.norm\.", "norm."),
        (r"^mlp_head\.0\.", "head."),
    )
]


def _stamp_mlp(given: Checkpoint) -> HeadFile:
    """Read STAMP's MLP and linear layer over the mean of the tiles."""
    state = {re.sub(r"^fc\.", "mlp.0.", key): x for key, x in given.state.items()}
    layers = sorted({int(key.split(".")[1]) for key in state if re.match(r"mlp\.\d+\.weight", key)})
    checked = Checkpoint(given.name, state, {}, {})
    widths = [checked.width(f"mlp.{layer}.weight") for layer in layers]
    head = PooledHead(checked.width(f"mlp.{layers[0]}.weight", 1), widths[-1], hidden=widths[:-1])
    return _of_stamp(given, filled(head, state, "STAMP's mlp", given.name), "STAMP mlp")


def _of_stamp(given: Checkpoint, head: SlideHead, layout: str) -> HeadFile:
    """Add the class names and facts in STAMP's hyperparameters to a head.

    Raises:
        UnsupportedModelError: the model does not classify slides by their tiles, or its class names do not match.
    """
    hyper = {key: value for key, value in given.hyper.items() if not isinstance(value, Unread)}
    task, features = hyper.get("task", "classification"), hyper.get("supported_features", "tile")
    if task != "classification" or features != "tile":
        raise UnsupportedModelError(
            f"a slide model must classify slides by features of tiles, got STAMP's task {task!r} on {features!r} "
            f"features in {given.name}; train it with task: classification on tile features"
        )
    categories = hyper.get("categories")
    classes = tuple(map(str, categories)) if isinstance(categories, Sequence) and categories else None
    if classes is not None and len(classes) != head.num_classes:
        raise UnsupportedModelError(
            f"a checkpoint must name a category for each output of its head, got {len(classes)} categories, "
            f"{', '.join(classes)}, for {head.num_classes} outputs in {given.name}; export the model again"
        )
    facts = {
        name: str(hyper[key])
        for key, name in (("ground_truth_label", "label"), ("stamp_version", "STAMP"), ("model_name", "model"))
        if isinstance(hyper.get(key), str)
    }
    return HeadFile(head, layout, classes, facts)


def _titan(given: Checkpoint) -> HeadFile:
    """Read TITAN's fine-tuned model: the vision encoder, its pooling, and one linear layer."""
    encoder_state = given.below(
        next(key for key in given.state if "vision_encoder." in key).split("vision_encoder.")[0]
    )
    vision = {key.removeprefix("vision_encoder."): x for key, x in encoder_state.items() if "vision_encoder." in key}
    weights = [key for key in given.state if re.search(r"(?:^|\.)(?:mlp|head|classifier)(?:\.0)?\.weight$", key)]
    weights = [key for key in weights if "vision_encoder." not in key and "text_encoder." not in key]
    if len(weights) != 1:
        raise UnsupportedModelError(
            f"TITAN must have one linear head (mlp.0), got {weights or 'none'} in {given.name}; fine-tune it with one "
            "layer, as its own script does"
        )
    head_key = weights[0].removesuffix("weight")
    impl = given.options.get("impl")
    vit = from_titan(vision, num_heads=given.options.get("num_heads") or 12, impl=impl)
    classes = given.width(weights[0])
    pool = given.options.get("pool") or "parallel"
    queries = int(vision["attn_pool.query"].shape[0]) if "attn_pool.query" in vision else 128
    if "attn_pool_contrastive.query" not in vision:
        raise UnsupportedModelError(
            f"TITAN must have its pooling (attn_pool_contrastive), got {given.name} without it; save the complete model"
        )
    head = TitanHead(vit, classes, pool, queries)
    poolers = ("attn_pool_contrastive.", "attn_pool.") if pool == "cascade" else ("attn_pool_contrastive.",)
    state = {f"vit.{key}": x for key, x in vit.state_dict().items()}
    state |= {key: x for key, x in vision.items() if key.startswith(poolers)}
    state |= {f"head.{key}": x for key, x in given.below(head_key).items()}
    return HeadFile(filled(head, state, "TITAN", given.name), "TITAN")


def _gigapath(given: Checkpoint) -> HeadFile:
    """Read GigaPath's fine-tuned model: ``slide_encoder`` and ``classifier.0``."""
    layers = given.options.get("layers") or (11,)
    vit = from_gigapath(
        given.below("slide_encoder."),
        num_heads=given.options.get("num_heads") or 16,
        global_pool=given.options.get("global_pool") or "token",
        impl=given.options.get("impl"),
    )
    read = given.width("classifier.0.weight", 1)
    if read != len(layers) * vit.embed_dim:
        raise UnsupportedModelError(
            f"GigaPath's head must read {vit.embed_dim} channels of each of its layers (feat_layer), got {read} "
            f"channels for the layers {list(layers)} in {given.name}; give the layers that it was trained with"
        )
    head = GigaPathHead(vit, given.width("classifier.0.weight"), layers)
    state = {f"vit.{key}": x for key, x in vit.state_dict().items()}
    state |= {f"classifier.{key}": x for key, x in given.below("classifier.").items()}
    return HeadFile(filled(head, state, "Prov-GigaPath", given.name), "Prov-GigaPath")


def _hipt(given: Checkpoint) -> HeadFile:
    """Read the slide level of HIPT and soma, over embeddings of regions."""
    if given.below("vit_region."):
        raise UnsupportedModelError(
            f"a slide head must not include an encoder, got HIPT's region transformer in {given.name}; load it with "
            "maskattn.nn.load_hipt"
        )
    layers = {key.split(".")[2] for key in given.state if key.startswith("global_transformer.layers.")}
    head = HIPTHead(
        given.width("global_phi.0.weight", 1),
        given.width("classifier.weight"),
        given.width("global_phi.0.weight"),
        given.options.get("num_heads") or 3,
        len(layers),
        impl=given.options.get("impl"),
    )
    return HeadFile(filled(head, given.state, "HIPT", given.name), "HIPT")


_LAYOUTS: tuple[tuple[str, Callable[[Checkpoint], HeadFile]], ...] = (
    (r"^vit_region\.|^global_phi\.", _hipt),
    (r"^attention_net\.", read_clam),
    (r"^attention_V\.", read_deep_mil),
    (r"vision_encoder\.", _titan),
    (r"^slide_encoder\.encoder\.layers\.", _gigapath),
    (r"^layer1\.attn\.to_qkv\.", _transmil),
    (r"^project_features\.0\.", _stamp_vit),
    (r"^mlp\.\d+\.weight$|^fc\.weight$", _stamp_mlp),
    (r"^fc\.(?:module\.)?0\.weight$|^classifier\.(?:module\.)?0\.weight$", read_best_instance),
)
"""Pattern of a key that only one layout has → the function that reads this layout."""
