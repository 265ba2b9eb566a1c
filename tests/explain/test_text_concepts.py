"""Concepts in words: files of vectors, prompts, zero-shot scores and maps of all concepts in one pass."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_vits import random_vit, sample

from maskattn.explain import IntegratedCDAM
from maskattn.explain.single_image import explain_image
from maskattn.explain.text_concepts import TextConcepts, encode_prompts, read_concepts

NAMES = ("gland", "stroma", "fat")


def vectors(C: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, C)).astype(np.float32)


@pytest.fixture(params=[".npy", ".npy with names", ".safetensors", ".csv", ".csv with a header"])
def file(request, tmp_path):
    path = tmp_path / f"concepts{request.param.split(' ')[0]}"
    if path.suffix == ".npy":
        np.save(path, vectors())
        if request.param != ".npy":
            path.with_suffix(".txt").write_text("\n".join(NAMES))
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
        from safetensors.numpy import save_file

        save_file(dict(zip(NAMES, vectors(), strict=True)), path)
    else:
        rows = [",".join([name, *map(repr, map(float, row))]) for name, row in zip(NAMES, vectors(), strict=True)]
        header = ["name," + ",".join(f"v{c}" for c in range(4))] if "header" in request.param else []
        path.write_text("\n".join(header + rows) + "\n")
    return path, ("concept 0", "concept 1", "concept 2") if request.param == ".npy" else NAMES


def test_files_of_every_kind_give_the_same_vectors_by_name(file):
    path, names = file
    concepts = read_concepts(path, temperature=7.0)
    by_name = dict(zip(concepts.names, concepts.vectors_KC, strict=True))
    assert set(by_name) == set(names)
    for name, vector in zip(names, vectors(), strict=True):
        torch.testing.assert_close(by_name[name], torch.from_numpy(vector))
    assert concepts.temperature == 7.0


def test_scores_are_the_temperature_times_the_cosine_and_maps_are_those_of_their_difference():
    model, (x, keep) = random_vit(), sample(1)
    concepts = TextConcepts(NAMES, torch.from_numpy(vectors()), 50.0)
    found = explain_image(model, x, concepts, keep)
    with torch.no_grad():
        z = model(x, keep)[0]
    expected = 50 * F.cosine_similarity(z[None], concepts.vectors_KC.double(), dim=1)
    assert found.names == NAMES
    torch.testing.assert_close(found.scores_M, expected)
    maps, gap = IntegratedCDAM(model, 40, "weights").attribute(x, concepts, keep, return_convergence_gap=True)
    assert maps.shape == (1, 3, 4, 4)
    assert gap.abs().max() < 1e-3
    torch.testing.assert_close(found.maps_MHW, maps[0], rtol=0.05, atol=0.05 * float(maps.abs().max()))
    alone = explain_image(model, x, TextConcepts(NAMES[:1], concepts.vectors_KC[:1], 50.0), keep)
    torch.testing.assert_close(alone.maps_MHW, found.maps_MHW[:1])
    assert list(found.as_json()["maps"]) == list(NAMES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: read_concepts(p / "c.pt"), r"\.npy, \.safetensors, \.csv, got"),
        (lambda p: np.save(p / "c.npy", np.zeros(3)) or read_concepts(p / "c.npy"), r"\(K, C\), got shape"),
        (lambda p: np.save(p / "c.npy", np.full((2, 3), np.nan)) or read_concepts(p / "c.npy"), "finite"),
        (lambda p: (p / "c.csv").write_text("a,1,2\nb,1\n") and read_concepts(p / "c.csv"), "a vector for each name"),
        (
            lambda p: (p / "c.csv").write_text("a,1,2\na,2,1\n") and read_concepts(p / "c.csv"),
            "must have a distinct name",
        ),
        (lambda p: (p / "c.csv").write_text("a,0,0\n") and read_concepts(p / "c.csv"), "direction"),
        (lambda p: (p / "c.csv").write_text("") or read_concepts(p / "c.csv"), "must hold a vector for each name"),
        (
            lambda p: (p / "c.safetensors").write_bytes(b"nothing") and read_concepts(p / "c.safetensors"),
            "for each name",
        ),
        (lambda p: TextConcepts(("a",), torch.ones(1, 3), 0.0), "temperature=0.0"),
        (lambda p: TextConcepts(("a",), torch.ones(1, 3))(torch.ones(1, 4)), "3 channels and an output of 4"),
        (lambda p: encode_prompts(p, ["a gland"]), "local folder with a CLIP"),
    ],
)
def test_wrong_files_and_numbers_are_named(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of concepts"):
        read_concepts(tmp_path / "c.npy")


def save_small_clip(folder):
    """A random CLIP of transformers with a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    text = {**small, "vocab_size": len(vocabulary), "max_position_embeddings": 40, "projection_dim": 24}
    text |= {"eos_token_id": len(vocabulary) - 1, "bos_token_id": len(vocabulary) - 2, "pad_token_id": 1}
    vision = {**small, "image_size": 64, "patch_size": 16, "projection_dim": 24}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    ).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")  # of transformers' own imports
def test_prompts_become_the_text_towers_embeddings_and_the_command_explains_them(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from maskattn.cli.app import app

    model = save_small_clip(tmp_path)
    prompts = ["malignant glands", "fat"]
    concepts = encode_prompts(tmp_path, prompts)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        for prompt, vector in zip(prompts, concepts.vectors_KC, strict=True):
            alone = tokenizer([prompt], return_tensors="pt")
            pooled = model.text_model(**{k: alone[k] for k in ("input_ids", "attention_mask")}).pooler_output
            torch.testing.assert_close(vector, model.text_projection(pooled)[0], rtol=1e-4, atol=1e-4)
    assert concepts.names == tuple(prompts)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(photo)
    out = tmp_path / "out.png"
    given = ["explain", str(photo), "--model", str(tmp_path), "--out", str(out)]
    result = CliRunner().invoke(app, [*given, "--prompt", prompts[0], "--prompt", prompts[1]])
    assert result.exit_code == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()[:2]] == prompts
    np.save(tmp_path / "concepts.npy", concepts.vectors_KC.numpy())
    (tmp_path / "concepts.txt").write_text("\n".join(prompts))
    same = CliRunner().invoke(app, [*given, "--concepts", str(tmp_path / "concepts.npy")])
    assert same.exit_code == 0, same.stderr
    assert same.stdout.splitlines()[:2] == result.stdout.splitlines()[:2]
    both = CliRunner().invoke(app, [*given, "--prompt", "fat", "--target", "1"])
    assert both.exit_code == 2
    assert "got --target and --prompt; leave the others out" in both.stderr


def save_small_siglip(folder):
    """A random SigLIP of transformers with a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: place for place, word in enumerate(["</s>", "<unk>", "malignant", "glands", "fat"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 8, "projection_size": 32}
    text |= {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    config = transformers.SiglipConfig(text_config=text, vision_config={**small, "image_size": 64, "patch_size": 16})
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        model.logit_scale.fill_(1.7)
        model.logit_bias.fill_(-2.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")  # of transformers' own imports
def test_siglips_prompts_give_its_own_logits_with_scale_and_bias(tmp_path):
    model = save_small_siglip(tmp_path)
    from maskattn.nn import load_vit

    prompts, x = ["malignant glands", "fat"], torch.randn(2, 3, 64, 64)
    concepts = encode_prompts(tmp_path, prompts)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(prompts, padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=tokens["input_ids"], pixel_values=x).logits_per_image
        torch.testing.assert_close(concepts(load_vit(tmp_path)(x)), theirs, rtol=1e-4, atol=1e-4)
    assert concepts.bias == pytest.approx(-2.5)
    assert concepts.temperature == pytest.approx(float(np.exp(1.7)), rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # of transformers' own imports
def test_the_command_explains_siglips_prompts(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from maskattn.cli.app import app

    save_small_siglip(tmp_path)
    photo, out = tmp_path / "photo.png", tmp_path / "out.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(photo)
    given = ["explain", str(photo), "--model", str(tmp_path), "--out", str(out)]
    result = CliRunner().invoke(app, [*given, "--prompt", "malignant glands", "--prompt", "fat"])
    assert result.exit_code == 0, result.stderr
    assert out.is_file()


def test_a_bias_moves_scores_and_no_map():
    model, (x, keep) = random_vit(), sample(1)
    plain = TextConcepts(NAMES, torch.from_numpy(vectors()), 5.0)
    biased = TextConcepts(NAMES, torch.from_numpy(vectors()), 5.0, bias=-3.0)
    one, other = (explain_image(model, x, concepts, keep) for concepts in (plain, biased))
    torch.testing.assert_close(other.scores_M, one.scores_M - 3)
    torch.testing.assert_close(other.maps_MHW, one.maps_MHW)
