"""Checkpoints of slide models with random weights, in each tool's layout, and each model written out plainly.

Written from the models' descriptions: papers, and the keys and shapes of their projects' checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

C, K, SPACING_UM = 24, 3, 0.5
State = dict[str, Tensor]


def normal(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, dtype=torch.float64)


def add_linear(state: State, name: str, outputs: int, inputs: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = normal(outputs, inputs), normal(outputs)


def add_norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = 1 + normal(width), normal(width)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def heads_apart(x: Tensor, heads: int) -> Tensor:
    return x.reshape(len(x), heads, -1).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    q, k, v = (heads_apart(x, heads) for x in (q, k, v))
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return (weights @ v).transpose(0, 1).reshape(q.shape[1], -1)


@dataclass
class Case:
    """A checkpoint, and its model: embeddings (T, C), places in µm (T, 2), cells (T, 2: column, row) → logits."""

    checkpoint: dict[str, Any]
    logits: Callable[[Tensor, Tensor, Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None


def clam(branches: bool, gate: bool = True, at: int = 3) -> Case:
    state: State = {}
    add_linear(state, "attention_net.0", 16, C)
    net, rows = f"attention_net.{at}", K if branches else 1
    if gate:
        add_linear(state, f"{net}.attention_a.0", 8, 16)
        add_linear(state, f"{net}.attention_b.0", 8, 16)
        add_linear(state, f"{net}.attention_c", rows, 8)
    else:
        add_linear(state, f"{net}.module.0", 8, 16)
        add_linear(state, f"{net}.module.{at}", rows, 8)
    for c in range(K):
        if branches:
            add_linear(state, f"classifiers.{c}", 1, 16)
        add_linear(state, f"instance_classifiers.{c}", 2, 16)
    if not branches:
        add_linear(state, "classifiers", K, 16)

    def logits(z: Tensor, um: Tensor, cells: Tensor) -> Tensor:
        h = linear(state, "attention_net.0", z).clamp(min=0)
        if gate:
            gated = linear(state, f"{net}.attention_b.0", h).sigmoid()
            scores = linear(state, f"{net}.attention_c", linear(state, f"{net}.attention_a.0", h).tanh() * gated)
        else:
            scores = linear(state, f"{net}.module.{at}", linear(state, f"{net}.module.0", h).tanh())
        pooled = [(scores[:, [a]].exp() * h).sum(0) / scores[:, a].exp().sum() for a in range(rows)]
        if branches:
            return torch.cat([linear(state, f"classifiers.{c}", pooled[c]) for c in range(K)])
        return linear(state, "classifiers", pooled[0])

    return Case(state, logits)


def best_instance(classes: int, earlier: bool = False) -> Case:
    """CLAM's MIL_fc (two classes) and MIL_fc_mc (more): as they are now, and as they were with dropout."""
    state: State = {}
    first, several = "fc.0", classes > 2
    if earlier and not several:
        first = "classifier.0"
    add_linear(state, first, 16, C)
    lasts = ["classifiers" if several else "classifier"]
    if earlier:
        lasts = [f"classifiers.{c}" for c in range(classes)] if several else ["classifier.3"]
    for last in lasts:
        add_linear(state, last, classes // len(lasts), 16)

    def logits(z: Tensor, um: Tensor, cells: Tensor) -> Tensor:
        h = linear(state, first, z).clamp(min=0)
        of_tiles = torch.cat([linear(state, last, h) for last in lasts], dim=1)
        shares = of_tiles.exp() / of_tiles.exp().sum(1, keepdim=True)
        best = max(range(len(z)), key=lambda t: (shares[t].max() if several else shares[t, 1]).item())
        return of_tiles[best]

    return Case(state, logits)


def deep_mil() -> Case:
    state: State = {}
    add_linear(state, "attention_V.0", 8, C)
    add_linear(state, "attention_U.0", 8, C)
    add_linear(state, "attention_w", 1, 8)
    add_linear(state, "classifier.0", 1, C)

    def logits(z: Tensor, um: Tensor, cells: Tensor) -> Tensor:
        gated = linear(state, "attention_V.0", z).tanh() * linear(state, "attention_U.0", z).sigmoid()
        a = linear(state, "attention_w", gated).softmax(0)
        one = linear(state, "classifier.0", (a * z).sum(0))
        return torch.stack([torch.zeros_like(one[0]), one[0]])

    return Case({"model_state_dict": state}, logits)


def transmil(dim: int = 32) -> Case:
    state: State = {"cls_token": normal(1, 1, dim)}
    add_linear(state, "_fc1.0", dim, C)
    add_linear(state, "_fc2", K, dim)
    add_norm(state, "norm", dim)
    for name, side in (("proj", 7), ("proj1", 5), ("proj2", 3)):
        state[f"pos_layer.{name}.weight"], state[f"pos_layer.{name}.bias"] = normal(dim, 1, side, side), normal(dim)
    for layer in ("layer1", "layer2"):
        add_norm(state, f"{layer}.norm", dim)
        state[f"{layer}.attn.to_qkv.weight"] = normal(3 * dim, dim)
        state[f"{layer}.attn.res_conv.weight"] = normal(8, 1, 33, 1)
        add_linear(state, f"{layer}.attn.to_out.0", dim, dim)

    def nystrom(layer: str, x: Tensor) -> Tensor:
        n, m, d = len(x), dim // 2, dim // 8
        group = -(-n // m)
        x = torch.cat([x.new_zeros(m * group - n, dim), x])
        q, k, v = (heads_apart(part, 8) for part in (x @ state[f"{layer}.attn.to_qkv.weight"].T).split(dim, dim=1))
        q = q * d**-0.5
        ql, kl = (torch.stack([y[:, i * group : (i + 1) * group].mean(1) for i in range(m)], 1) for y in (q, k))
        first, middle, last = (
            (a @ b.transpose(1, 2)).softmax(-1) for a, b in ((q, kl), (ql, kl), (ql, k))
        )  # (8, N, m), (8, m, m), (8, m, N)
        inverse = middle.transpose(1, 2) / (middle.abs().sum(2).max() * middle.abs().sum(1).max())
        unit = torch.eye(m, dtype=x.dtype)
        for _ in range(6):
            p = middle @ inverse
            inverse = inverse @ (13 * unit - p @ (15 * unit - p @ (7 * unit - p))) / 4
        out = first @ inverse @ last @ v
        kernel = state[f"{layer}.attn.res_conv.weight"][:, 0, :, 0]
        padded = F.pad(v, (0, 0, 16, 16))
        out = out + sum(kernel[:, i, None, None] * padded[:, i : i + v.shape[1]] for i in range(33))
        return linear(state, f"{layer}.attn.to_out.0", out.transpose(0, 1).reshape(len(x), dim))[-n:]

    def logits(z: Tensor, um: Tensor, cells: Tensor) -> Tensor:
        h = linear(state, "_fc1.0", z).clamp(min=0)
        side = math.ceil(math.sqrt(len(h)))
        x = torch.cat([state["cls_token"][0], h, h[: side**2 - len(h)]])
        x = x + nystrom("layer1", norm(state, "layer1.norm", x))
        square = x[1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
        mixed = square
        for name, pad in (("proj", 3), ("proj1", 2), ("proj2", 1)):
            weight, bias = state[f"pos_layer.{name}.weight"], state[f"pos_layer.{name}.bias"]
            mixed = mixed + F.conv2d(square, weight, bias, padding=pad, groups=dim)
        x = torch.cat([x[:1], mixed.permute(0, 2, 3, 1).reshape(-1, dim)])
        x = x + nystrom("layer2", norm(state, "layer2.norm", x))
        return linear(state, "_fc2", norm(state, "norm", x[0]))

    return Case(state, logits)


def stamp_hyper(name: str, **more: Any) -> dict[str, Any]:
    return {
        "task": "classification",
        "supported_features": "tile",
        "model_name": name,
        "categories": ["low", "middle", "high"],
        "category_weights": torch.ones(K),
        "ground_truth_label": "grade",
        "dim_input": C,
        **more,
    }


def stamp_vit(alibi: bool, dim: int = 32, heads: int = 4) -> Case:
    state: State = {"class_token": normal(dim)}
    add_linear(state, "project_features.0", dim, C)
    add_linear(state, "mlp_head.0", K, dim)
    add_norm(state, "transformer.norm", dim)
    for i in range(2):
        layer = f"transformer.layers.{i}"
        add_norm(state, f"{layer}.0.norm", dim)
        add_norm(state, f"{layer}.1.0", dim)
        add_linear(state, f"{layer}.1.1", 48, dim)
        add_linear(state, f"{layer}.1.4", dim, 48)
        if not alibi:
            state[f"{layer}.0.mhsa.in_proj_weight"], state[f"{layer}.0.mhsa.in_proj_bias"] = (
                normal(3 * dim, dim),
                normal(3 * dim),
            )
            add_linear(state, f"{layer}.0.mhsa.out_proj", dim, dim)
            continue
        add_linear(state, f"{layer}.0.mhsa.fc", dim, dim)
        for h in range(heads):
            for part in ("query", "key", "value"):
                add_linear(state, f"{layer}.0.mhsa.{part}_encoders.{h}", dim // heads, dim)
            state[f"{layer}.0.mhsa.attentions.{h}.bias_scale"] = normal(1)
            state[f"{layer}.0.mhsa.attentions.{h}.scale_distance.running_mean"] = 900 + normal(1)
            state[f"{layer}.0.mhsa.attentions.{h}.scale_distance.items_so_far"] = torch.full((1,), 7.0).double()

    def with_distances(layer: str, x: Tensor, um: Tensor) -> Tensor:
        outs = []
        distances = (um[:, None] - um[None]).square().sum(-1).sqrt()
        for h in range(heads):
            q, k, v = (linear(state, f"{layer}.0.mhsa.{part}_encoders.{h}", x) for part in ("query", "key", "value"))
            at = f"{layer}.0.mhsa.attentions.{h}"
            penalty = distances / state[f"{at}.scale_distance.running_mean"] * state[f"{at}.bias_scale"]
            outs.append(((q @ k.T * k.shape[1] ** -0.5).softmax(-1) - penalty) @ v)
        return linear(state, f"{layer}.0.mhsa.fc", torch.cat(outs, 1))

    def logits(z: Tensor, um: Tensor, cells: Tensor) -> Tensor:
        um = torch.cat([um.new_zeros(1, 2), um])
        x = torch.cat([state["class_token"][None], F.gelu(linear(state, "project_features.0", z))])
        for i in range(2):
            layer = f"transformer.layers.{i}"
            y = norm(state, f"{layer}.0.norm", x)
            if alibi:
                y = with_distances(layer, y, um)
            else:
                qkv = y @ state[f"{layer}.0.mhsa.in_proj_weight"].T + state[f"{layer}.0.mhsa.in_proj_bias"]
                y = linear(state, f"{layer}.0.mhsa.out_proj", attend(*qkv.split(dim, dim=1), heads))
            x = x + y
            hidden = F.gelu(linear(state, f"{layer}.1.1", norm(state, f"{layer}.1.0", x)))
            x = x + linear(state, f"{layer}.1.4", hidden)
        return linear(state, "mlp_head.0", norm(state, "transformer.norm", x[0]))

    lightning = {
        "state_dict": {f"model.{key}": x for key, x in state.items()},
        "hyper_parameters": stamp_hyper("vit", n_heads=heads, use_alibi=alibi),
        "pytorch-lightning_version": "2.5.0",
    }
    return Case(lightning, logits, classes=("low", "middle", "high"))


def stamp_mlp() -> Case:
    state: State = {}
    add_linear(state, "mlp.0", 20, C)
    add_linear(state, "mlp.3", K, 20)

    def logits(z: Tensor, um: Tensor, cells: Tensor) -> Tensor:
        return linear(state, "mlp.3", linear(state, "mlp.0", z.mean(0)).clamp(min=0))

    lightning = {
        "state_dict": {f"model.{key}": x for key, x in state.items()},
        "hyper_parameters": stamp_hyper("mlp"),
    }
    return Case(lightning, logits, classes=("low", "middle", "high"))


def titan(pool: str, dim: int = 48, heads: int = 4, pool_heads: int = 8) -> Case:
    state: State = {"cls_token": normal(1, 1, dim), "proj": normal(dim, dim)}
    add_linear(state, "patch_embed.0", dim, C)
    add_norm(state, "norm", dim)
    for i in range(2):
        block = f"blocks.modules_list.{i}"
        add_linear(state, f"{block}.attn.qkv", 3 * dim, dim)
        add_linear(state, f"{block}.attn.proj", dim, dim)
        add_linear(state, f"{block}.mlp.fc1", 4 * dim, dim)
        add_linear(state, f"{block}.mlp.fc2", dim, 4 * dim)
        add_norm(state, f"{block}.norm1", dim)
        add_norm(state, f"{block}.norm2", dim)
    for name, queries in (("attn_pool", 5), ("attn_pool_contrastive", 1)):
        state[f"{name}.query"] = normal(queries, dim)
        state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"] = normal(3 * dim, dim), normal(3 * dim)
        add_linear(state, f"{name}.attn.out_proj", dim, dim)
        add_norm(state, f"{name}.ln_q", dim)
        add_norm(state, f"{name}.ln_k", dim)
    own: State = {}
    add_linear(own, "mlp.0", K, dim)

    def pooled(name: str, x: Tensor) -> Tensor:
        q, k = norm(state, f"{name}.ln_q", state[f"{name}.query"]), norm(state, f"{name}.ln_k", x)
        weights = state[f"{name}.attn.in_proj_weight"].split(dim)
        biases = state[f"{name}.attn.in_proj_bias"].split(dim)
        q, k, v = (y @ w.T + b for y, w, b in zip((q, k, k), weights, biases, strict=True))
        return linear(state, f"{name}.attn.out_proj", attend(q, k, v, pool_heads))

    def logits(z: Tensor, um: Tensor, cells: Tensor) -> Tensor:
        slopes = torch.tensor([2 ** (-8.0 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64)
        distances = (cells[:, None] - cells[None]).double().square().sum(-1).sqrt()
        bias = F.pad(-slopes[:, None, None] * distances, (1, 0, 1, 0))
        x = torch.cat([state["cls_token"][0], F.gelu(linear(state, "patch_embed.0", z))])
        for i in range(2):
            block = f"blocks.modules_list.{i}"
            qkv = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6))
            x = x + linear(state, f"{block}.attn.proj", attend(*qkv.split(dim, dim=1), heads, bias))
            hidden = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
            x = x + linear(state, f"{block}.mlp.fc2", hidden)
        x = norm(state, "norm", x, 1e-6)
        if pool == "cascade":
            x = pooled("attn_pool", x)
        return linear(own, "mlp.0", pooled("attn_pool_contrastive", x)[0])

    checkpoint = {f"model.vision_encoder.{key}": x for key, x in state.items()} | own
    checkpoint["model.text_encoder.token_embedding.weight"] = normal(7, dim)
    return Case(checkpoint, logits, {"num_heads": heads, "pool": pool})


def gigapath(layers: tuple[int, ...], dim: int = 48, heads: int = 4) -> Case:
    state: State = {"cls_token": normal(1, 1, dim)}
    add_linear(state, "patch_embed.proj", dim, C)
    add_norm(state, "norm", dim)
    add_norm(state, "encoder.layer_norm", dim)
    for i in range(3):
        layer = f"encoder.layers.{i}"
        for part in "qkv":
            add_linear(state, f"{layer}.self_attn.{part}_proj", dim, dim)
        add_linear(state, f"{layer}.self_attn.out_proj", dim, dim)
        add_norm(state, f"{layer}.self_attn.inner_attn_ln", dim)
        add_norm(state, f"{layer}.self_attn_layer_norm", dim)
        add_norm(state, f"{layer}.final_layer_norm", dim)
        add_linear(state, f"{layer}.ffn.fc1", 4 * dim, dim)
        add_linear(state, f"{layer}.ffn.fc2", dim, 4 * dim)
        add_norm(state, f"{layer}.ffn.ffn_layernorm", 4 * dim)
    own: State = {}
    add_linear(own, "classifier.0", K, len(layers) * dim)

    def sines(place: Tensor) -> Tensor:
        frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        return torch.cat([(place[:, None] * frequency).sin(), (place[:, None] * frequency).cos()], 1)

    def logits(z: Tensor, um: Tensor, cells: Tensor) -> Tensor:
        x = linear(state, "patch_embed.proj", z) + torch.cat([sines(cells[:, 1]), sines(cells[:, 0])], 1)
        x = torch.cat([state["cls_token"][0], x])
        read = [norm(state, "norm", x[0], 1e-6)]
        for i in range(3):
            layer = f"encoder.layers.{i}"
            y = norm(state, f"{layer}.self_attn_layer_norm", x)
            y = attend(*(linear(state, f"{layer}.self_attn.{part}_proj", y) for part in "qkv"), heads)
            x = x + linear(state, f"{layer}.self_attn.out_proj", norm(state, f"{layer}.self_attn.inner_attn_ln", y))
            hidden = F.gelu(linear(state, f"{layer}.ffn.fc1", norm(state, f"{layer}.final_layer_norm", x)))
            x = x + linear(state, f"{layer}.ffn.fc2", norm(state, f"{layer}.ffn.ffn_layernorm", hidden))
            read.append(norm(state, "norm", x[0], 1e-6))
        return linear(own, "classifier.0", torch.cat([read[layer] for layer in layers]))

    checkpoint = {f"slide_encoder.{key}": x for key, x in state.items()} | own
    return Case(checkpoint, logits, {"num_heads": heads, "layers": layers})


CASES: dict[str, Callable[[], Case]] = {
    "CLAM_SB": lambda: clam(branches=False),
    "CLAM_MB": lambda: clam(branches=True),
    "CLAM_SB without a gate": lambda: clam(branches=False, gate=False),
    "CLAM_MB of an earlier version": lambda: clam(branches=True, at=2),
    "CLAM_SB of an earlier version, without a gate": lambda: clam(branches=False, gate=False, at=2),
    "MIL_fc": lambda: best_instance(2),
    "MIL_fc of an earlier version": lambda: best_instance(2, earlier=True),
    "MIL_fc_mc": lambda: best_instance(K),
    "MIL_fc_mc of an earlier version": lambda: best_instance(K, earlier=True),
    "AttentionDeepMIL": deep_mil,
    "TransMIL": transmil,
    "STAMP vit": lambda: stamp_vit(alibi=False),
    "STAMP vit, ALiBi": lambda: stamp_vit(alibi=True),
    "STAMP mlp": stamp_mlp,
    "TITAN": lambda: titan("parallel"),
    "TITAN, cascade": lambda: titan("cascade"),
    "Prov-GigaPath": lambda: gigapath((3,)),
    "Prov-GigaPath, two layers": lambda: gigapath((1, 3)),
}


def tiles(count: int = 23, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, places in µm and cells (column, row) of tiles on a 7 × 6 grid, in random order."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(42, generator=generator)[:count]
    cells = torch.stack([place % 7, place // 7], dim=1)
    return torch.randn(count, C, generator=generator, dtype=torch.float64), cells.double() * 256 * SPACING_UM, cells
