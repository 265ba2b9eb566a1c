"""Attachments to a model's parts take effect: hooks, adapters, parametrisations, quantisation, patched forwards.

A class-token model's last block and every patch embedding read weights instead of calling layers, which would go round
all of these; so would methods that run an encoder's parts.
"""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskattn.nn import HIPT, SlideModel, SlideModelConfig, VisionTransformer
from maskattn.nn.blocks import Block
from maskattn.nn.hipt import slide_level

PARTS = [
    "patch_embed",
    "patch_embed.proj",
    "blocks.0",
    "blocks.0.attn.qkv",
    "blocks.1",
    "blocks.1.norm1",
    "blocks.1.attn",
    "blocks.1.attn.qkv",
    "blocks.1.attn.proj",
    "blocks.1.norm2",
    "blocks.1.mlp",
    "blocks.1.mlp.fc1",
    "norm",
    "head",
]
LAYERS = ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
CALLED_FOR_EVERY_ROW = [part for part in PARTS if part.startswith("blocks")]


def random_vit(**arguments: object) -> VisionTransformer:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = VisionTransformer(**{**small, **arguments}).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def sample(B: int = 2) -> tuple[Tensor, Tensor]:
    keep = torch.rand(B, 4, 4) > 0.4
    keep[:, 0, 0] = True
    return torch.randn(B, 3, 32, 32, dtype=torch.float64), keep


class Numbers(TorchDispatchMode):
    """Counts the numbers that operations give; unlike torch's counter of operations it hooks no module."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


def numbers_made(model: nn.Module, *inputs: Tensor) -> int:
    with Numbers() as counter, torch.no_grad():
        model(*inputs)
    return counter.count


@pytest.mark.parametrize("part", PARTS)
def test_hooks_of_every_kind_fire_and_change_nothing(part):
    model, (x, keep) = random_vit(), sample()
    x.requires_grad_()
    expected = model(x, keep)
    fired: list[str] = []
    module = model.get_submodule(part)
    module.register_forward_pre_hook(lambda module, inputs: fired.append("before"))
    module.register_forward_hook(lambda module, inputs, output: fired.append("after"))
    module.register_full_backward_pre_hook(lambda module, gradient: fired.append("backward begins"))
    module.register_full_backward_hook(lambda module, inputs, outputs: fired.append("backward ends"))
    output = model(x, keep)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert fired == ["before", "after", "backward begins", "backward ends"]


@pytest.mark.parametrize("part", CALLED_FOR_EVERY_ROW)
def test_a_hooked_layer_of_any_block_sees_every_token(part):
    model, (x, keep) = random_vit(), sample()
    seen: list[Tensor] = []
    model.get_submodule(part).register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x, keep)
    assert len(seen[0]) == int(keep.sum()) + len(x)


def test_global_module_hooks_see_every_layer_once():
    model, (x, keep) = random_vit(), sample()
    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: called.append(module))
    try:
        model(x, keep)
    finally:
        handle.remove()
    for part in PARTS:
        assert sum(module is model.get_submodule(part) for module in called) == 1, part


@pytest.mark.parametrize("part", LAYERS)
def test_a_hook_that_changes_an_output_changes_the_model_as_other_weights_do(part):
    model, (x, keep) = random_vit(), sample()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for p in expected.get_submodule(part).parameters():
            p.mul_(2)
    model.get_submodule(part).register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(model(x, keep), expected(x, keep))


def test_features_collected_by_hooks_are_those_of_a_model_that_returns_them():
    model, (x, _) = random_vit(), sample()
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    torch.testing.assert_close(model.norm(seen[0]).unflatten(0, (2, -1)), model.forward_features(x))


class LowRank(nn.Module):
    """A layer with an adapter beside it, which still shows the layer's weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, layer.out_features, bias=False, dtype=torch.float64)

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)
    in_features = property(lambda self: self.layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        merged = copy.deepcopy(self.layer)
        with torch.no_grad():
            merged.weight += self.up.weight @ self.down.weight
        return merged


@pytest.mark.parametrize("part", LAYERS[1:])
def test_an_adapter_gives_the_output_of_merged_weights_and_takes_a_gradient(part):
    model, (x, keep) = random_vit(), sample()
    owner, _, name = part.rpartition(".")
    adapter = LowRank(model.get_submodule(part))
    merged = copy.deepcopy(model)
    setattr(model.get_submodule(owner), name, adapter)
    setattr(merged.get_submodule(owner), name, adapter.merged())
    output = model(x, keep)
    torch.testing.assert_close(output, merged(x, keep))
    output.sum().backward()
    assert adapter.down.weight.grad.any()
    assert adapter.up.weight.grad.any()


@pytest.mark.parametrize("targets", [["qkv"], ["qkv", "proj", "fc1", "fc2"]])
def test_pefts_lora_gives_the_output_of_its_merged_weights_and_takes_a_gradient(targets):
    peft = pytest.importorskip("peft")
    model, (x, keep) = random_vit(), sample()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted.eval().double()
    output = adapted(x, keep)
    output.sum().backward()
    assert all(p.grad.any() for name, p in adapted.named_parameters() if "lora_" in name)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) >= 2 * len(targets)
    merged = adapted.merge_and_unload()
    assert type(merged.blocks[1].attn.qkv) is nn.Linear
    torch.testing.assert_close(merged(x, keep), output)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("part", LAYERS)
def test_a_parametrised_layer_gives_the_output_of_the_weight_it_stands_for(part):
    model, (x, keep) = random_vit(), sample()
    expected = copy.deepcopy(model)
    expected.get_submodule(part).weight.data.mul_(2)
    parametrize.register_parametrization(model.get_submodule(part), "weight", Doubled())
    output = model(x, keep)
    torch.testing.assert_close(output, expected(x, keep))
    output.sum().backward()
    assert model.get_submodule(part).parametrizations.weight.original.grad.any()


@pytest.mark.parametrize("part", LAYERS)
def test_weight_norm_and_pruning_take_effect(part):
    model, (x, keep) = random_vit(), sample()
    expected = model(x, keep)
    normed = copy.deepcopy(model)
    layer = parametrizations.weight_norm(normed.get_submodule(part))
    torch.testing.assert_close(normed(x, keep), expected)
    layer.parametrizations.weight.original0.data.mul_(3)
    model.get_submodule(part).weight.data.mul_(3)
    torch.testing.assert_close(normed(x, keep), model(x, keep))
    pruned = copy.deepcopy(model)
    for each in (model, pruned):
        prune.l1_unstructured(each.get_submodule(part), "weight", amount=0.5)
    prune.remove(pruned.get_submodule(part), "weight")
    torch.testing.assert_close(model(x, keep), pruned(x, keep))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_dynamically_quantised_model_runs_its_quantised_layers_everywhere():
    model, (x, keep) = random_vit().float(), sample()
    x = x.float()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    output = quantised(x, keep)
    torch.testing.assert_close(output, quantised.head(quantised.forward_features(x, keep)[:, 0]))
    exact = model(x, keep)
    assert 0 < (output - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("part", ["patch_embed.proj", "blocks.1", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.mlp"])
@pytest.mark.parametrize("way", ["instance", "subclass", "class"])
def test_a_patched_forward_is_called(part, way, monkeypatch):
    model, (x, keep) = random_vit(), sample()
    module, called = model.get_submodule(part), []
    kind, original = type(module), type(module).forward

    def forward(self: nn.Module, *inputs: Tensor) -> Tensor:
        called.append(self)
        return original(self, *inputs)

    expected = model(x, keep)
    if way == "instance":
        module.forward = types.MethodType(forward, module)
    elif way == "subclass":
        module.__class__ = type(f"Patched{kind.__name__}", (kind,), {"forward": forward})
    else:
        monkeypatch.setattr(kind, "forward", forward)
    torch.testing.assert_close(model(x, keep), expected)
    assert any(each is module for each in called)


def test_the_shortcut_is_taken_again_once_all_attachments_are_removed():
    model, inputs = random_vit(), sample()
    short = numbers_made(model, *inputs)
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: None)
    assert numbers_made(model, *inputs) > short
    handle.remove()
    assert numbers_made(model, *inputs) == short
    model.blocks[1] = nn.Sequential()  # a block of another kind altogether
    model.blocks[1].forward = lambda rows, tokens: rows
    assert model(*inputs).shape == (2, 3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_hooked_last_block_is_checkpointed_like_the_others(checkpointing):
    model, (x, keep) = random_vit(), sample()
    model.set_grad_checkpointing(checkpointing)
    calls: list[int] = []
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: calls.append(1))
    model(x, keep).sum().backward()
    assert len(calls) == 1 + checkpointing


def counting(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda module, inputs, output: calls.append(1))
    return calls


def test_hooks_of_a_slide_models_encoders_fire():
    arguments = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    config = SlideModelConfig("small", ("a", "b"), 32, 0.5, arguments, {**arguments, "img_size": 4})
    model = SlideModel(config).eval()
    of_tiles, of_slide = counting(model.tile_encoder), counting(model.slide_encoder)
    embeddings = model.encode_tiles(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    model(embeddings, torch.ones(1, 2, dtype=torch.bool))
    assert (of_tiles, of_slide) == ([1], [1])


def test_hooks_of_hipts_encoders_fire():
    arguments = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    patch = VisionTransformer(img_size=32, patch_size=8, **arguments)
    region = VisionTransformer(img_size=2, patch_size=1, in_chans=24, **arguments)
    model = HIPT(patch, region, slide_level(24, 2), patch_px=32).eval()
    counts = [counting(part) for part in (model.patch_encoder, model.region_encoder, model.slide_encoder)]
    embeddings, _ = model.encode_regions(torch.randn(1, 3, 64, 64))
    model(embeddings, torch.ones(1, 1, dtype=torch.bool))
    assert counts == [[1], [1], [1]]


def test_a_subclass_of_the_block_is_called():
    class Silent(Block):
        def forward(self, rows_TC, tokens):
            return torch.zeros_like(super().forward(rows_TC, tokens))

    model, (x, keep) = random_vit(), sample()
    model.blocks[1].__class__ = Silent
    expected = model.head(model.norm(torch.zeros(2, 24, dtype=torch.float64)))
    torch.testing.assert_close(model(x, keep), expected)
