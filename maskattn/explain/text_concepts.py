"""Text concepts: vectors in the shared image–text space of a vision–language model.

An image's score for a concept is temperature · cos(image embedding, vector), the zero-shot logit of CLIP (Radford et
al., arXiv 2103.00020). SigLIP (Zhai et al., arXiv 2303.15343) adds a bias, and the sigmoid of the sum is the
probability that the text matches. All concepts are explained in one pass, like the classes of a classifier.

Dimension key: B images, K concepts, C channels of the shared space.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskattn.shapes import Float

__all__ = ["DEFAULT_TEMPERATURE", "TextConcepts", "encode_prompts", "read_concepts", "temperature_of"]

DEFAULT_TEMPERATURE = 100.0
_ENDINGS = (".npy", ".safetensors", ".csv")
# CLIP and SigLIP store the logarithm of the temperature under the first key, and SigLIP its bias under the second.
_SCALE, _BIAS = "logit_scale", "logit_bias"


@dataclass(frozen=True, eq=False)
class TextConcepts:
    """A target with a score for each of K concepts.

    Attributes:
        names: distinct names of the K concepts.
        vectors_KC: (K, C), of any length.
        temperature: factor of the cosine.
        bias: term added to all scores: SigLIP's bias, or 0 for CLIP. No map attributes it to a token.

    Raises:
        ValueError: vectors are not finite, nonzero and (K, C), names are not K distinct ones, or the temperature is not
            above 0.
    """

    names: tuple[str, ...]
    vectors_KC: Float[Tensor, "K C"]
    temperature: float = DEFAULT_TEMPERATURE
    bias: float = 0.0

    def __post_init__(self) -> None:
        shape = tuple(self.vectors_KC.shape)
        if len(shape) != 2 or not shape[0] or not shape[1] or not bool(self.vectors_KC.isfinite().all()):
            raise ValueError(f"concepts must be finite vectors (K, C), at least one, got shape {shape}")
        if len(self.names) != shape[0] or len(set(self.names)) != shape[0]:
            raise ValueError(
                f"each of the {shape[0]} concepts must have a distinct name, got {len(self.names)} names, "
                f"{len(set(self.names))} of them distinct"
            )
        if not bool((self.vectors_KC.norm(dim=1) > 0).all()):
            raise ValueError("a concept's vector must have a direction, got one of zeros")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got temperature={self.temperature}")

    def __call__(self, output_BC: Float[Tensor, "B C"]) -> Float[Tensor, "B K"]:
        """Map (B, C) image embeddings to (B, K) scores.

        Raises:
            ValueError: the model's output has another width than the concepts.
        """
        if output_BC.shape[-1] != self.vectors_KC.shape[1]:
            raise ValueError(
                f"concepts must be in the space of the model's output, got vectors of {self.vectors_KC.shape[1]} "
                f"channels and an output of {output_BC.shape[-1]}; load the image tower with its projection"
            )
        directions = F.normalize(self.vectors_KC.to(output_BC), dim=1)
        return self.temperature * F.normalize(output_BC, dim=-1) @ directions.mT + self.bias


def read_concepts(path: Path, temperature: float | None = None, of_model: float | None = None) -> TextConcepts:
    """Read concepts from a file.

    Args:
        path: ``.npy``, (K, C), whose names are the lines of the ``.txt`` file of the same name, or "concept 0" and so
            on; ``.safetensors``, a vector (C,) under each name; or ``.csv``, a row for each concept: name, C numbers.
        temperature: factor of the cosine; None takes the exponential of ``logit_scale`` in a ``.safetensors``, as CLIP
            stores it, else ``of_model``, else CLIP's 100.
        of_model: the model's own temperature, if known; see :func:`temperature_of`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, or holds no concepts.
    """
    if path.suffix not in _ENDINGS:
        raise ValueError(f"a file of concepts must end in {', '.join(_ENDINGS)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of concepts {path}")
    try:
        stored: float | None = None
        if path.suffix == ".safetensors":
            names, vectors, stored = _read_safetensors(path)
        else:
            names, vectors = {".npy": _read_npy, ".csv": _read_csv}[path.suffix](path)
        factor = next((x for x in (temperature, stored, of_model) if x is not None), DEFAULT_TEMPERATURE)
        return TextConcepts(tuple(names), torch.from_numpy(np.ascontiguousarray(vectors)).float(), factor)
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy, safetensors and csv each raise their own kinds
        raise ValueError(f"a file of concepts must hold a vector for each name, got {path}: {error}") from error


def encode_prompts(folder: Path, prompts: Sequence[str], temperature: float | None = None) -> TextConcepts:
    """Encode texts as concepts, with the text tower of a CLIP or SigLIP model of transformers in a local folder.

    Args:
        folder: a folder with ``config.json``, weights and the tokenizer's files; PLIP and QuiltNet are CLIP models.
        prompts: distinct texts; each is the name of its concept.
        temperature: factor of the cosine; None takes the folder's own.

    Raises:
        ValueError: the folder has no text tower, or no tokenizer.
    """
    import transformers

    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(
            "prompts need a local folder with a CLIP or SigLIP model of transformers, text tower included, got "
            f"{folder}; give vectors with --concepts instead"
        )
    siglip = json.loads(config.read_text(encoding="utf-8")).get("model_type") == "siglip"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        kind = transformers.SiglipTextModel if siglip else transformers.CLIPTextModelWithProjection
        tower = kind.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"prompts need a text tower and its tokenizer, got {folder}, where they cannot be loaded: {error}; give "
            "vectors with --concepts instead"
        ) from error
    # SigLIP was trained on texts padded to one length, without a mask.
    padding = (
        {"padding": "max_length", "max_length": tower.config.max_position_embeddings} if siglip else {"padding": True}
    )
    names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
    with torch.no_grad():
        tokens = tokenizer(list(prompts), truncation=True, return_tensors="pt", **padding)
        output = tower(**{name: tokens[name] for name in names})
    vectors_KC = output.pooler_output if siglip else output.text_embeds
    factor = next((x for x in (temperature, temperature_of(folder)) if x is not None), DEFAULT_TEMPERATURE)
    bias = _number_in(folder, _BIAS) if siglip else None
    return TextConcepts(tuple(prompts), vectors_KC, factor, bias or 0.0)


def temperature_of(folder: Path) -> float | None:
    """Return the temperature that a model was trained with, from ``logit_scale`` in its weights; None if absent.

    Args:
        folder: a model folder of transformers or open_clip; for anything else the result is None.
    """
    logarithm = _number_in(folder, _SCALE)
    return None if logarithm is None else math.exp(logarithm)


def _number_in(folder: Path, key: str) -> float | None:
    """Return a number in a folder's weights; None if no file has it."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt") as weights:
                if key in weights.keys():  # noqa: SIM118 (no mapping, though it has keys)
                    return float(weights.get_tensor(key))
        except SafetensorError:
            continue
    return None


def _read_npy(path: Path) -> tuple[list[str], np.ndarray]:
    vectors = np.load(path, allow_pickle=False)
    if vectors.ndim != 2:
        raise ValueError(f"the array must be (K, C), got shape {vectors.shape}")
    names = path.with_suffix(".txt")
    if not names.is_file():
        return [f"concept {index}" for index in range(len(vectors))], vectors
    return [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()], vectors


def _read_safetensors(path: Path) -> tuple[list[str], np.ndarray, float | None]:
    from safetensors.numpy import load_file

    vectors = load_file(path)
    scale = vectors.pop(_SCALE, None)
    temperature = None if scale is None else math.exp(float(scale.reshape(())))
    return list(vectors), np.stack([vector.reshape(-1) for vector in vectors.values()]), temperature


def _read_csv(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and not _is_number(rows[0][-1]):
        rows = rows[1:]  # a header
    return [row[0].strip() for row in rows], np.array([[float(x) for x in row[1:]] for row in rows])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
