"""timm's and transformers' models are explained as they come: CDAM against captum run on the models themselves."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_within_budget
from torch import Tensor, nn

from maskattn.explain import CDAM, AttentionMap, Concept, IntegratedCDAM, SmoothCDAM
from maskattn.explain.packed_model import packed_model, without_head

captum = pytest.importorskip("captum.attr")


def timm_vit(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model and its last block's first norm."""
    timm = pytest.importorskip("timm")
    options = {"token": {}, "registers": {"reg_tokens": 2, "init_values": 0.4}, "mean": {"global_pool": "avg"}}[kind]
    small = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**small, **options)
    return model, model.blocks[-1].norm1


def transformers_vit(kind: str) -> tuple[nn.Module, nn.Module]:
    transformers = pytest.importorskip("transformers")
    small = {
        "image_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_labels": 5,
    }
    if kind == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**small, patch_size=16))
    else:
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**small, patch_size=16))
    norms = [m for name, m in model.named_modules() if name.endswith(("layernorm_before", "norm1"))]
    return model, norms[-1]


class Logits(nn.Module):
    """captum wants a tensor, transformers gives a record."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return out if isinstance(out, Tensor) else out.logits


MODELS = {
    "timm, class token": (lambda: timm_vit("token"), 1),
    "timm, registers, LayerScale": (lambda: timm_vit("registers"), 3),
    "timm, mean": (lambda: timm_vit("mean"), 1),
    "transformers, ViT": (lambda: transformers_vit("vit"), 1),
    "transformers, DINOv2": (lambda: transformers_vit("dinov2"), 1),
}


def prepared(name: str) -> tuple[nn.Module, nn.Module, int]:
    make, prefix = MODELS[name]
    model, norm = make()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval(), norm, prefix


def grid(scores_BNC: Tensor, prefix: int) -> Tensor:
    return scores_BNC.sum(dim=2)[:, prefix:].unflatten(1, (4, 4)).detach()


@pytest.mark.parametrize("name", MODELS)
def test_cdam_is_captums_gradient_times_activation_at_the_last_blocks_first_norm(name):
    model, norm, prefix = prepared(name)
    x = torch.randn(2, 3, 64, 64)
    got = CDAM(model).attribute(x, "all")

    def oracle(dtype: torch.dtype) -> Tensor:
        logits = Logits(model.to(dtype))
        images = x.to(dtype).requires_grad_()
        layer = captum.LayerGradientXActivation(logits, norm)
        maps = [grid(layer.attribute(images, target=c), prefix) for c in range(5)]
        return torch.stack(maps, dim=1)

    assert_within_budget(got, oracle(torch.float64), oracle(torch.float32), name)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_libraries_keep_their_mode_and_get_every_explanation(name):
    model, _, _ = prepared(name)
    x = torch.randn(2, 3, 64, 64)
    if "timm" in name:
        model.train()
    mode = model.training
    concept = Concept.from_images(model, x)
    for explain in (CDAM(model), SmoothCDAM(model, m=2), IntegratedCDAM(model, m=2)):
        for target in (1, concept):
            assert explain.attribute(x, target).shape == (2, 4, 4)
    assert AttentionMap(model).attribute(x).shape == (2, 4, 4)
    assert model.training == mode


def test_other_models_are_refused_and_named():
    with pytest.raises(TypeError, match="got Linear"):
        CDAM(nn.Linear(2, 2))


def test_later_changes_of_a_converted_model_have_no_effect():
    model, _, _ = prepared("timm, class token")
    x = torch.randn(1, 3, 64, 64)
    cdam = CDAM(model)
    before = cdam.attribute(x, 0)
    nn.init.zeros_(model.head.weight)
    assert torch.equal(cdam.attribute(x, 0), before)


def test_the_headless_twin_shares_weights_and_leaves_its_model_alone():
    model, _, _ = prepared("timm, class token")
    ours = packed_model(model)
    twin = without_head(ours)
    assert twin.blocks is ours.blocks
    assert ours.num_classes == 5
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.head(twin(x)), ours(x))
