"""``attn_implementation="maskattn"`` in transformers' own models, against its eager attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskattn.nn import register_attention

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
IMAGES = {**SMALL, "image_size": 64, "patch_size": 16}
ENCODERS = {
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGES, intermediate_size=96)),
    "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**IMAGES)),
    "DINOv2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**IMAGES)
    ),
    "DINOv3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**IMAGES, intermediate_size=96)),
    "I-JEPA": lambda: transformers.IJepaModel(transformers.IJepaConfig(**IMAGES, intermediate_size=96)),
    "BERT": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=96, vocab_size=50)),
}


def random_model(name: str) -> nn.Module:
    model = ENCODERS[name]().double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def outputs_and_gradient(
    model: nn.Module, implementation: str, inputs: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    model.set_attn_implementation(implementation)
    out = model(**inputs).last_hidden_state
    if "attention_mask" in inputs:
        out = out[inputs["attention_mask"].bool()]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), list(model.parameters()), materialize_grads=True)


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "BERT":
        return {"input_ids": torch.randint(50, (2, 17))}
    return {"pixel_values": torch.randn(2, 3, 64, 64, dtype=torch.float64)}


@pytest.mark.parametrize("name", ENCODERS)
def test_without_a_mask_it_is_eager_attention_forward_and_gradient(name):
    model, inputs = random_model(name), inputs_of(name)
    expected, expected_grads = outputs_and_gradient(model, "eager", inputs)
    got, grads = outputs_and_gradient(model, register_attention(), inputs)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "DINOv3"])  # which takes no mask
def test_masked_keys_are_left_out_as_in_eager_attention(name):
    model, inputs = random_model(name), inputs_of(name)
    tokens = model(**inputs).last_hidden_state.shape[1]
    mask = torch.rand(2, tokens) > 0.4
    mask[:, 0] = True
    inputs["attention_mask"] = mask.long()
    expected, expected_grads = outputs_and_gradient(model, "eager", inputs)
    got, grads = outputs_and_gradient(model, register_attention(), inputs)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_causal_models_and_masks_of_queries_are_refused_and_named():
    name = register_attention()
    config = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=3, vocab_size=50)
    gpt = transformers.GPT2Model(config).eval()
    gpt.set_attn_implementation(name)
    with pytest.raises(ValueError, match=r"bidirectional encoders|causal attention"):
        gpt(input_ids=torch.randint(50, (1, 5)))
    model = random_model("BERT")
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(B, N\), got \(1, 1, 4, 4\)"):
        model(input_ids=torch.randint(50, (1, 4)), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_dropout_of_weights_is_taken_in_training():
    config = transformers.ViTConfig(**IMAGES, intermediate_size=96, attention_probs_dropout_prob=0.5)
    model = transformers.ViTModel(config).train()
    model.set_attn_implementation(register_attention())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(model(x).last_hidden_state, model(x).last_hidden_state)
    model.eval()
    assert torch.equal(model(x).last_hidden_state, model(x).last_hidden_state)


@pytest.mark.parametrize("kind", ["SiglipVision", "ViT", "CLIPVision"])
def test_attention_weights_are_refused_even_where_the_model_does_not_pass_the_request_on(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(image_size=32, patch_size=8, **sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.set_attn_implementation(register_attention())
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="does not support output_attentions"):
        model(x, output_attentions=True)
    assert len(model(x, output_hidden_states=True).hidden_states) == 3
