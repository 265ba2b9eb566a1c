"""Explanations of one image from a file, for ``maskattn explain``.

Dimension key: M maps, H·W grid tokens, Y·X px, C channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskattn.errors import SlideError
from maskattn.explain.attention_maps import attend_from_class_token
from maskattn.explain.concepts import Concept
from maskattn.explain.explainer import Request, as_maps
from maskattn.explain.map_check import MapCheck, check_tokens
from maskattn.explain.methods import DEFAULT_METHOD, method_named
from maskattn.explain.packed_model import check_explainable, without_head
from maskattn.explain.text_concepts import TextConcepts
from maskattn.nn.adapters.open_clip_files import CONFIG as OPEN_CLIP_CONFIG
from maskattn.nn.encoders.entry import IMAGENET, Triple, triple_of
from maskattn.nn.encoders.open_clip import pixel_statistics
from maskattn.nn.encoders.table import entry_of_hub
from maskattn.nn.timm_import import import_timm
from maskattn.nn.vit import VisionTransformer
from maskattn.shapes import Bool, Float, UInt8

__all__ = [
    "ImageExplanation",
    "explain_image",
    "normalisation_of",
    "normalised",
    "read_image",
    "read_keep",
    "size_for",
]

_DRAWS = 3  # random draws of a map check: each costs 0.4 predictions of the full model


@dataclass(frozen=True)
class ImageExplanation:
    """The explanation of one image.

    Attributes:
        names: names of the M targets.
        scores_M: (M,), the model's score of each target: logits, or similarity to the concept.
        maps_MHW: (M, H, W), signed relevance.
        attention_HW: (H, W), the class token's row, mean over heads; None for models without a class token.
        method: the title of the method.
        checks: the checks of the M maps; empty if they were not checked.
    """

    names: tuple[str, ...]
    scores_M: Float[Tensor, "M"]
    maps_MHW: Float[Tensor, "M H W"]
    attention_HW: Float[Tensor, "H W"] | None
    method: str = ""
    checks: tuple[MapCheck, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return scores and map checks as the JSON object that is written next to the picture."""
        maps = {}
        for index, name in enumerate(self.names):
            of_map: dict[str, Any] = {"score": float(self.scores_M[index]), "method": self.method}
            maps[name] = of_map | (self.checks[index].as_json() if self.checks else {"map_check": "not asked for"})
        return {"maps": maps}

    def titles(self) -> list[str]:
        """Return the title of each map: name and score, and the verdict of the map check unless it passed."""
        titles = [f"{name}: {score:.3g}" for name, score in zip(self.names, self.scores_M.tolist(), strict=True)]
        for index, check in enumerate(self.checks):
            titles[index] += "" if check.passed else f" (map check: {check.map_check})"
        return titles


def size_for(model: VisionTransformer, path: Path) -> tuple[int, int]:
    """Return the height and width, in px, to which an image file is resized for a model.

    The shorter side becomes the model's own and the longer one is scaled with it, rounded to a multiple of the token
    size. Models with a fixed size (dynamic_img_size=False) see the image distorted.

    Raises:
        OSError: the file does not exist or is not an image.
    """
    from PIL import Image

    p = model.patch_embed.patch_size
    own = model.grid_HW[0] * p, model.grid_HW[1] * p
    if not model.dynamic_img_size:
        return own
    with Image.open(path) as image:
        width, height = image.size
    scale = min(own) / min(width, height)
    return max(round(height * scale / p), 1) * p, max(round(width * scale / p), 1) * p


def read_image(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "Y X 3"]:
    """Read an image file as RGB, resized to this height and width.

    Raises:
        OSError: the file does not exist or is not an image.
    """
    from PIL import Image

    with Image.open(path) as image:
        resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def read_keep(path: Path, grid_HW: tuple[int, int]) -> Bool[Tensor, "1 H W"]:
    """Read a mask file as (1, H, W) bool over tokens: True where any of the token's area is tissue.

    Pixels are interpreted as those of a slide's mask.

    Raises:
        ValueError: the file does not exist, is not an image, is all background, or its pixel values are ambiguous.
    """
    from maskattn.mask_images.decoding import read_mask_image
    from maskattn.mask_images.meaning import tissue_of

    try:
        mask, _ = tissue_of(read_mask_image(path, lambda _: False), str(path))
    except SlideError as error:
        raise ValueError(str(error)) from error
    if not mask.any():
        raise ValueError(f"--keep must leave some of the image, got a mask in '{path}' that is background throughout")
    bounds = [_bounds(n, size) for n, size in zip(grid_HW, mask.shape, strict=True)]
    strips = [np.logical_or.reduce(mask[top:bottom]) for top, bottom in bounds[0]]
    return torch.tensor([[[bool(strip[left:right].any()) for left, right in bounds[1]] for strip in strips]])


def _bounds(tokens: int, size_px: int) -> list[tuple[int, int]]:
    """Return the range of pixels that overlap each token along one axis."""
    return [(token * size_px // tokens, -(-(token + 1) * size_px // tokens)) for token in range(tokens)]


def normalisation_of(source: str) -> tuple[Triple, Triple]:
    """Return the mean and standard deviation of the pixels that a model was trained with.

    They are read from timm, the table of encoders, or the model's folder or repository; without an entry there, they
    are ImageNet's.

    Args:
        source: the model's source as :func:`maskattn.nn.checkpoints.load_vit` takes it.
    """
    if source.startswith("timm:"):
        timm = import_timm()

        own = timm.get_pretrained_cfg(source.removeprefix("timm:"))
        return IMAGENET if own is None else (triple_of(own.mean), triple_of(own.std))
    entry = entry_of_hub(source.removeprefix("hf-hub:")) if source.startswith("hf-hub:") else None
    if entry is not None:
        return entry.pixel_mean, entry.pixel_std
    for file, mean, std in (("preprocessor_config.json", "image_mean", "image_std"), ("config.json", "mean", "std")):
        config = _file_of_model(source, file)
        config = config.get("pretrained_cfg") or config  # timm nests its own
        if config.get(mean) and config.get(std):
            return triple_of(config[mean]), triple_of(config[std])
    of_open_clip = _file_of_model(source, OPEN_CLIP_CONFIG)
    return pixel_statistics(of_open_clip) if of_open_clip else IMAGENET


def _file_of_model(source: str, file: str) -> dict[str, Any]:
    """Read a JSON file of a model's folder or of its repository on the hub; {} if it does not exist."""
    path = Path(source) / file
    if source.startswith("hf-hub:"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(source.removeprefix("hf-hub:"), file))
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def normalised(image_YX3: UInt8[np.ndarray, "Y X 3"], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (1, 3, Y, X) float: pixels scaled to [0, 1], minus ``mean``, divided by ``std``.

    Raises:
        ValueError: a mean is not finite, or a standard deviation is not above 0.
    """
    if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        raise ValueError(
            "normalisation needs finite means and standard deviations above 0, got "
            f"mean={tuple(mean)} and std={tuple(std)}; give those of pixels scaled to [0, 1]"
        )
    pixels = torch.from_numpy(image_YX3.copy()).permute(2, 0, 1)[None].float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def explain_image(
    model: VisionTransformer,
    inputs: Float[Tensor, "1 3 Y X"],
    targets: Sequence[int] | Concept | TextConcepts | None = None,
    keep: Bool[Tensor, "1 H W"] | None = None,
    method: str = DEFAULT_METHOD,
    check: bool = True,
) -> ImageExplanation:
    """Compute attention and class maps of one image.

    Args:
        model: a vision transformer in eval mode.
        inputs: (1, 3, Y, X) normalised pixels.
        targets: class indices; a concept; text concepts in the space of the model's output; None for the three classes
            with the largest logits.
        keep: (1, H, W) bool, True = the token takes part; None keeps all.
        method: a key of :data:`maskattn.explain.methods.METHODS`; its random numbers have a fixed seed.
        check: check each map by the scores of its most and of its least relevant tokens alone.

    Raises:
        ValueError: there is no such method or class, or the model has no classes and no concept is given.
    """
    explainer = method_named(method)(model)
    check_explainable(explainer.model)
    request, names = _request(explainer.model, inputs, targets, keep)
    maps_MHW = explainer.answer(request)[0]
    scores_M, attention_HW = request.scores_BM[0], None
    if request.model.cls_token is not None:
        rows_HT = attend_from_class_token(request.model, request.tokens)
        attention_HW = as_maps(rows_HT.mean(dim=0, keepdim=True), request.tokens)[0, 0]
    checks: tuple[MapCheck, ...] = ()
    if check:
        maps_MN = maps_MHW.flatten(1)
        checks = tuple(check_tokens(request.model, request.embedded, request.target, maps_MN, shares=(), draws=_DRAWS))
    return ImageExplanation(names, scores_M, maps_MHW, attention_HW, method_named(method).title, checks)


def _request(
    model: VisionTransformer,
    inputs: Tensor,
    targets: Sequence[int] | Concept | TextConcepts | None,
    keep: Tensor | None,
) -> tuple[Request, tuple[str, ...]]:
    """Return one request, for which the backbone runs only once, and the names of the targets."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(targets, TextConcepts):
        return Request(model, inputs, targets, keep, generator), targets.names
    if isinstance(targets, Concept):
        request = Request(without_head(model), inputs, targets, keep, generator)
        M = request.scores_BM.shape[1]
        return request, ("concept",) if M == 1 else tuple(f"concept {i}" for i in range(M))
    if model.num_classes == 0:
        raise ValueError(
            "a class map needs a model with classes, got num_classes=0; give example images of a concept instead"
        )
    request = Request(model, inputs, "all", keep, generator)
    likeliest = min(3, model.num_classes)
    classes = request.scores_BM[0].topk(likeliest).indices.tolist() if targets is None else list(targets)
    return request.asking(classes), tuple(f"class {c}" for c in classes)
