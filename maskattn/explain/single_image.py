"""One image from a file, explained: what ``maskattn explain`` does.

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
from maskattn.nn.encoders.entry import IMAGENET, Triple, triple_of
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

_DRAWS = 3  # of a map's check: every one is 0.4 of a prediction by the whole model


@dataclass(frozen=True)
class ImageExplanation:
    """What was found in one image.

    Attributes:
        names: of the M targets.
        scores_M: (M,), what the model gives for each: logits, or similarity to the concept.
        maps_MHW: (M, H, W), signed relevance.
        attention_HW: (H, W), the class token's row, mean over heads; None for models without a class token.
        method: the title of the method.
        checks: of the M maps, their tests; empty where they were not tested.
    """

    names: tuple[str, ...]
    scores_M: Float[Tensor, "M"]
    maps_MHW: Float[Tensor, "M H W"]
    attention_HW: Float[Tensor, "H W"] | None
    method: str = ""
    checks: tuple[MapCheck, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Scores and tests, as the file beside the picture has them."""
        maps = {}
        for place, name in enumerate(self.names):
            of_map: dict[str, Any] = {"score": float(self.scores_M[place]), "method": self.method}
            maps[name] = of_map | (self.checks[place].as_json() if self.checks else {"map_check": "not asked for"})
        return {"maps": maps}

    def titles(self) -> list[str]:
        """What a picture writes over each map: name and score, and the verdict where it has to be said."""
        titles = [f"{name}: {score:.3g}" for name, score in zip(self.names, self.scores_M.tolist(), strict=True)]
        for place, check in enumerate(self.checks):
            titles[place] += "" if check.passed else f" (map check: {check.map_check})"
        return titles


def size_for(model: VisionTransformer, path: Path) -> tuple[int, int]:
    """Height and width, in px, at which a model sees an image file.

    The shorter side becomes the model's own, the longer one follows, rounded to tokens; models of
    one size alone (dynamic_img_size=False) see the image distorted.
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
    """An image file as RGB of this height and width.

    Raises:
        OSError: the file is not there or no image.
    """
    from PIL import Image

    with Image.open(path) as image:
        resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def read_keep(path: Path, grid_HW: tuple[int, int]) -> Bool[Tensor, "1 H W"]:
    """A mask file as tokens: those of whose area some is tissue, as a slide's mask is read.

    Raises:
        ValueError: the file is not there, is no image, or does not say which of its pixels count.
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
    """The pixels that each token shares some area with, along one axis."""
    return [(token * size_px // tokens, -(-(token + 1) * size_px // tokens)) for token in range(tokens)]


def normalisation_of(source: str) -> tuple[Triple, Triple]:
    """Mean and standard deviation of pixels that a model was trained with, where timm or its folder says; ImageNet's.

    Args:
        source: what :func:`maskattn.nn.checkpoints.load_vit` was given.
    """
    if source.startswith("timm:"):
        import timm

        own = timm.get_pretrained_cfg(source.removeprefix("timm:"))
        return IMAGENET if own is None else (triple_of(own.mean), triple_of(own.std))
    for file, mean, std in (("preprocessor_config.json", "image_mean", "image_std"), ("config.json", "mean", "std")):
        said = _file_of_model(source, file)
        said = said.get("pretrained_cfg") or said  # timm's
        if said.get(mean) and said.get(std):
            return triple_of(said[mean]), triple_of(said[std])
    return IMAGENET


def _file_of_model(source: str, file: str) -> dict[str, Any]:
    """A JSON file of a model's folder or of its repository on the hub; nothing where there is none."""
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
    """(1, 3, Y, X) float: pixels in [0, 1], less ``mean``, over ``std``.

    Raises:
        ValueError: a mean is not finite, or a deviation is not above 0.
    """
    if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
        raise ValueError(
            f"pixels need finite means and deviations above 0 to be normalised, got mean={tuple(mean)} and "
            f"std={tuple(std)}; they are of pixels scaled to [0, 1]"
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
    """Attention and class maps of one image.

    Args:
        model: in eval mode.
        inputs: (1, 3, Y, X).
        targets: class indices; a concept; concepts in words, of the model's output; None for the three classes with
            the largest logits.
        keep: (1, H, W) bool, True = the token takes part; None keeps all.
        method: a key of :data:`maskattn.explain.methods.METHODS`; what it draws at random comes from a fixed seed.
        check: test each map by what the model makes of the tokens that it calls most and least relevant.

    Raises:
        ValueError: there is no such method or class, or the model has no classes and there is no concept.
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
        told = request.model, request.embedded, request.target, maps_MHW.flatten(1)
        checks = tuple(check_tokens(*told, shares=(), draws=_DRAWS))
    return ImageExplanation(names, scores_M, maps_MHW, attention_HW, method_named(method).title, checks)


def _request(
    model: VisionTransformer,
    inputs: Tensor,
    targets: Sequence[int] | Concept | TextConcepts | None,
    keep: Tensor | None,
) -> tuple[Request, tuple[str, ...]]:
    """What is asked of the model, whose backbone then runs once for everything, and the names of the targets."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(targets, TextConcepts):
        return Request(model, inputs, targets, keep, generator), targets.names
    if isinstance(targets, Concept):
        request = Request(without_head(model), inputs, targets, keep, generator)
        M = request.scores_BM.shape[1]
        return request, ("concept",) if M == 1 else tuple(f"concept {i}" for i in range(M))
    if model.num_classes == 0:
        raise ValueError("this model has no classes (num_classes=0); give example images of a concept instead")
    request = Request(model, inputs, "all", keep, generator)
    likeliest = min(3, model.num_classes)
    classes = request.scores_BM[0].topk(likeliest).indices.tolist() if targets is None else list(targets)
    return request.asking(classes), tuple(f"class {c}" for c in classes)
