"""The files of a model that open_clip saved, and the arguments of the image tower in its configuration.

The formats follow factory.py, push_to_hf_hub.py, model.py and timm_model.py of open_clip 3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskattn.nn.adapters.conversion import refuse
from maskattn.nn.adapters.timm import from_timm
from maskattn.nn.hub_files import first_of_hub
from maskattn.nn.timm_import import import_timm

__all__ = ["CONFIG", "WEIGHTS", "OpenClipFiles"]

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Options with which open_clip's own tower pools its tokens in a way that ours does not support.
_REFUSED = ("attentional_pool", "final_ln_after_pool", "global_average_pool")


@dataclass(frozen=True)
class OpenClipFiles:
    """A model's configuration and weights.

    Attributes:
        config: path of ``open_clip_config.json``.
        weights: path of the weights.
    """

    config: Path
    weights: Path

    @classmethod
    def of_folder(cls, folder: Path) -> OpenClipFiles:
        """Return the files of a folder.

        Raises:
            FileNotFoundError: a file is missing.
        """
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if weights is None:
            raise FileNotFoundError(f"a folder of open_clip holds {' or '.join(WEIGHTS)}, and {folder} has neither")
        return cls.of_weights(weights)

    @classmethod
    def of_weights(cls, weights: Path) -> OpenClipFiles:
        """Return a file of weights and the configuration in its folder.

        Raises:
            FileNotFoundError: the folder has no configuration.
        """
        config = weights.parent / CONFIG
        if not config.is_file():
            raise FileNotFoundError(
                f"weights of open_clip need the {CONFIG} that was saved with them, which states their activation, got "
                f"{weights} alone; put it beside them"
            )
        return cls(config, weights)

    @classmethod
    def of_hub(cls, hub_id: str) -> OpenClipFiles:
        """Return the files of a repository on Hugging Face's hub, downloaded unless they are in the cache.

        Raises:
            FileNotFoundError: the repository lacks one of them.
            Exception: huggingface_hub's own, if the repository cannot be reached or may not be read.
        """
        return cls(first_of_hub(hub_id, (CONFIG,)), first_of_hub(hub_id, WEIGHTS))

    def said(self) -> dict[str, Any]:
        """Return the content of the configuration."""
        content: dict[str, Any] = json.loads(self.config.read_text(encoding="utf-8"))
        return content

    def arguments(self) -> dict[str, Any]:
        """Return those arguments of our model that the weights do not determine.

        Raises:
            UnsupportedModelError: a ValueError that names what ours does not have.
        """
        name, model = str(self.config.parent), self.said().get("model_cfg", {})
        tower = model.get("vision_cfg", {})
        if tower.get("timm_model_name"):
            return _of_timm(tower, model.get("embed_dim", 0), name)
        return _of_own_tower(tower, bool(model.get("quick_gelu")), name)


def _of_own_tower(tower: dict[str, Any], quick_gelu: bool, name: str) -> dict[str, Any]:
    act, norm = dict(tower.get("act_kwargs") or {}), dict(tower.get("norm_kwargs") or {})
    tanh = not quick_gelu and act.pop("approximate", "none") == "tanh"
    eps = norm.pop("eps", None)
    unknown = [f"{key}={tower[key]!r}" for key in _REFUSED if tower.get(key)]
    unknown += [f"{key}={value!r}" for key, value in (("act_kwargs", act), ("norm_kwargs", norm)) if value]
    if tower.get("pool_type", "tok") != "tok":
        unknown.append(f"pool_type={tower['pool_type']!r}")
    refuse(name, unknown)
    said: dict[str, Any] = {"act_layer": "quick_gelu" if quick_gelu else "gelu_tanh" if tanh else "gelu"}
    if "head_width" in tower:
        said["num_heads"] = tower.get("width", 768) // tower["head_width"]
    if eps is not None:
        said["norm_eps"] = eps
    return said


def _of_timm(tower: dict[str, Any], embed_dim: int, name: str) -> dict[str, Any]:
    """Return the arguments of a tower that timm builds, read from its network, which gets no memory for weights."""
    timm = import_timm()

    architecture, pool = tower["timm_model_name"], tower.get("timm_pool", "avg")
    if not timm.is_model(architecture):
        refuse(name, [f"timm {timm.__version__} has no model {architecture!r}"])
    if pool in ("abs_attn", "rot_attn"):
        refuse(name, [f"timm_pool={pool!r}"])
    more = dict(tower.get("timm_model_kwargs") or {})
    projection = tower.get("timm_proj", "linear")
    with torch.device("meta"):
        if projection in ("linear", "mlp"):
            network = timm.create_model(architecture, **more)
            # An empty pool is that of timm's own model.
            network.reset_classifier(0, **({"global_pool": pool} if pool else {}))
        else:
            width = 0 if projection == "none" else embed_dim
            network = timm.create_model(architecture, num_classes=width, global_pool=pool, **more)
    said = from_timm(network, copy=False).arguments
    return {key: value for key, value in said.items() if key not in ("num_classes", "impl")}
