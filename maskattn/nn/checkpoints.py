"""Vision transformers from timm, from Hugging Face's hub and from files in the layouts of pathology checkpoints.

A file determines everything about its model except the number of heads. Its layout is recognised by its keys: timm's
(UNI, UNI2, H-optimus, Virchow), DINO's and HIPT's (``teacher``, ``backbone.``, ``phi``), DINOv2's own, and open_clip's
and CONCH's image towers (CLIP, PLIP, QuiltNet, BiomedCLIP) with their projection.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from maskattn.nn.adapters.clip import CLIP_FAMILIES
from maskattn.nn.adapters.conch import HEAD_WIDTH, has_conch_pool
from maskattn.nn.adapters.conversion import build, refuse
from maskattn.nn.adapters.open_clip import from_open_clip, has_clip_tower, with_projection
from maskattn.nn.adapters.open_clip_files import CONFIG, OpenClipFiles
from maskattn.nn.adapters.siglip import SIGLIP_FAMILIES
from maskattn.nn.adapters.timm import from_timm
from maskattn.nn.adapters.transformers import from_transformers
from maskattn.nn.hub_files import first_of_hub
from maskattn.nn.timm_import import import_timm
from maskattn.nn.vit import VisionTransformer
from maskattn.nn.weight_files import read_weights

__all__ = ["explained", "from_state_dict", "hub_id_of", "load_open_clip", "load_vit", "unwrapped"]

# The keys under which training checkpoints hold the weights, preferred ones first.
_WRAPPERS = ("teacher", "state_dict", "model_state_dict", "model", "student")
_WEIGHTS_ALONE = "pytorch_model.bin"  # in a repository without a configuration, as CONCH's
# The prefix of these keys is the encoder's; other prefixes belong to projection heads and text towers.
_EMBEDDINGS = ("patch_embed.proj.weight", "patch_embed.0.weight", "phi.0.weight")
# Keys that only DINO and its descendants have: mask tokens, projection heads, blocks in chunks, phi.
_OF_DINO = re.compile(
    r"(?:^|\.)(?:mask_token|masked_embed|\w*head\.last_layer\..+|phi\.0\.weight|blocks\.\d+\.\d+\..+|mlp\.w12\.weight)$"
)
_LEFT_OUT = re.compile(r"^(?:mask_token|masked_embed|head\.(?:mlp|last_layer|prototypes)\b.*)$")


def load_vit(
    source: str | Path, *, num_heads: int | None = None, impl: str | None = None, **arguments: Any
) -> VisionTransformer:
    """Load a vision transformer as a packed :class:`VisionTransformer`.

    Args:
        source: ``"timm:NAME"``, a timm model; ``"hf-hub:ORG/NAME"``, a model of timm, transformers or open_clip on
            Hugging Face's hub; a local ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file; or a folder with
            ``config.json`` or ``open_clip_config.json``.
        num_heads: the number of heads, needed for a file, which does not record it; refused for other sources.
        impl: the implementation of attention; None takes the best.
        arguments: for timm, those of ``timm.create_model`` (``pretrained=False`` for random weights); for
            transformers, those of ``from_pretrained``; for a file, those of :class:`VisionTransformer` that differ
            from what its keys say.

    Returns:
        The model, in eval mode, with its classifier if it was saved with one. Of a vision–language model it is the
        image tower, with the projection into the joint embedding space as its head.

    Raises:
        ValueError: ``num_heads`` is missing, or is given where the source records it.
        FileNotFoundError: there is no such file.
        PermissionError: the hub wants an agreement or a login first; the message says what to do.
        ConnectionError: the hub cannot be reached and the model is not in the cache; the message says what to do.
        UnsupportedModelError: a ValueError that names every part that the packed model does not have.
    """
    name = str(source)
    if num_heads is not None and (name.startswith(("timm:", "hf-hub:")) or Path(source).is_dir()):
        raise ValueError(
            f"num_heads is for a file of weights, which does not record it, got num_heads={num_heads} for {name}, "
            "which does; leave it out"
        )
    if name.startswith("timm:"):
        return _load_timm(name.removeprefix("timm:"), impl, arguments).eval()
    if name.startswith("hf-hub:"):
        return _load_from_hub(name.removeprefix("hf-hub:"), impl, arguments).eval()
    if Path(source).is_dir():
        return _load_folder(Path(source), impl, arguments).eval()
    return from_state_dict(read_weights(source), num_heads=num_heads, name=name, impl=impl, copy=False, **arguments)


def from_state_dict(
    checkpoint: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    name: str = "the checkpoint",
    impl: str | None = None,
    copy: bool = True,
    **arguments: Any,
) -> VisionTransformer:
    """Build a packed vision transformer from a checkpoint's tensors.

    Args:
        checkpoint: a state dict, or a training checkpoint that holds one (``teacher``, ``state_dict``, ``model``).
        num_heads: the number of heads, which the tensors determine only for models with a q/k norm.
        name: the checkpoint's name in error messages.
        impl: the implementation of attention; None takes the best.
        copy: whether the tensors are copied; False uses the checkpoint's own, which must then not be used elsewhere.
        arguments: arguments of :class:`VisionTransformer` that the tensors do not determine (``global_pool``,
            ``act_layer``, ``norm_eps``, ``img_size`` of a grid that is not square), or that are to differ from the
            layout's own library (``pos_embed_resample``: "dino" for training checkpoints of DINO, HIPT's and DINOv2's
            layouts, else "timm"; a file of DINO's backbone alone cannot be told from timm's and needs "dino").
            ``num_classes=0`` leaves out the head.

    Raises:
        UnsupportedModelError: a ValueError that names every unexpected or missing key.
        ValueError: num_heads is missing.
    """
    inner = unwrapped(checkpoint)
    if has_clip_tower(inner):
        return from_open_clip(inner, num_heads=num_heads, name=name, impl=impl, **arguments)
    own = _own_keys(inner, name)
    state = _own_layout(own)
    if arguments.get("num_classes") == 0:
        state = {key: x for key, x in state.items() if not key.startswith("head.")}
    inferred = _arguments(state, name, arguments.get("img_size"))
    inferred["pos_embed_resample"] = _convention(checkpoint)
    # HIPT's phi and TITAN's patch_embed are a linear layer and a GELU.
    inferred["embed_act"] = None if "patch_embed.proj.weight" in own else "gelu"
    if num_heads is None and "blocks.0.attn.q_norm.weight" in state:
        num_heads = inferred["embed_dim"] // len(state["blocks.0.attn.q_norm.weight"])
    if num_heads is None and has_conch_pool(inner):
        num_heads = inferred["embed_dim"] // HEAD_WIDTH
    if num_heads is None:
        raise ValueError(
            f"num_heads must be given for a file of weights, which does not record it, got None for {name} with "
            f"{inferred['embed_dim']} channels; pass num_heads (ViTs of 64 channels a head have "
            f"{inferred['embed_dim'] // 64})"
        )
    return build(name, {**inferred, "num_heads": num_heads, **arguments}, state, impl=impl, copy=copy)


def _load_timm(name: str, impl: str | None, arguments: dict[str, Any]) -> VisionTransformer:
    timm = import_timm()

    try:
        model = timm.create_model(name, **{"pretrained": True, **arguments})
    except Exception as error:
        raise explained(error, hub_id_of(name)) from error
    return from_timm(model, impl=impl, copy=False)


def hub_id_of(name: str) -> str:
    """Return the hub's repository with the weights of a timm model; the name itself if timm records none."""
    timm = import_timm()

    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    hub_id: str = getattr(config, "hf_hub_id", None) or name
    return f"{hub_id}{name}" if hub_id.endswith("/") else hub_id


def _load_from_hub(name: str, impl: str | None, arguments: dict[str, Any]) -> VisionTransformer:
    try:
        path = first_of_hub(name, ("config.json", CONFIG, _WEIGHTS_ALONE))
        if path.name == CONFIG:
            return load_open_clip(OpenClipFiles.of_hub(name), impl, arguments)
        if path.name == _WEIGHTS_ALONE:
            return from_state_dict(read_weights(path), name=name, impl=impl, copy=False, **arguments)
        config = json.loads(path.read_text(encoding="utf-8"))
        if "model_type" not in config:
            return _load_timm(f"hf-hub:{name}", impl, arguments)
        return _load_transformers(name, config, impl, arguments)
    except Exception as error:
        raise explained(error, name) from error


def _load_folder(folder: Path, impl: str | None, arguments: dict[str, Any]) -> VisionTransformer:
    path = folder / "config.json"
    if not path.is_file() and (folder / CONFIG).is_file():
        return load_open_clip(OpenClipFiles.of_folder(folder), impl, arguments)
    if not path.is_file():
        raise FileNotFoundError(
            f"a model's folder must have a config.json or {CONFIG}, got neither in {folder}; pass the file of weights"
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    if "model_type" in config:
        return _load_transformers(str(folder), config, impl, arguments)
    return _load_timm(f"local-dir:{folder}", impl, arguments)


def load_open_clip(files: OpenClipFiles, impl: str | None, arguments: dict[str, Any]) -> VisionTransformer:
    """Load the image tower of a model that open_clip saved. Arguments and errors as in :func:`load_vit`."""
    arguments = {**files.arguments(), **arguments}
    name = str(files.weights.parent)
    return from_state_dict(read_weights(files.weights), name=name, impl=impl, copy=False, **arguments)


def _load_transformers(
    name: str, config: dict[str, Any], impl: str | None, arguments: dict[str, Any]
) -> VisionTransformer:
    import transformers

    if config["model_type"] in CLIP_FAMILIES:
        # AutoModel would leave the projection out.
        tower = transformers.CLIPVisionModelWithProjection.from_pretrained(name, **arguments)
        return from_transformers(tower, impl=impl, copy=False)
    # AutoModel would leave a classifier's head out.
    classifies = any(kind.endswith("ForImageClassification") for kind in config.get("architectures") or ())
    if config["model_type"] in SIGLIP_FAMILIES and not classifies:
        return from_transformers(
            transformers.SiglipVisionModel.from_pretrained(name, **arguments), impl=impl, copy=False
        )
    loader = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    return from_transformers(loader.from_pretrained(name, **arguments), impl=impl, copy=False)


def explained(error: Exception, name: str) -> Exception:
    """Return an error of the hub with its remedy added; any other error is returned unchanged."""
    name = name.removeprefix("hf-hub:")
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    # Compared by class name, because the hub's client changed its HTTP library, and so the classes, between versions.
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if "GatedRepoError" in kinds:
        return PermissionError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with `hf auth login` or "
            "set HF_TOKEN; or download its weights on another machine and pass the file"
        )
    if "RepositoryNotFoundError" in kinds:
        return FileNotFoundError(
            f"Hugging Face's hub has no {name}, or shows it only to users who are logged in (`hf auth login`)"
        )
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException", "URLError"}:
        return ConnectionError(
            f"{name} is not in the local cache and its hub cannot be reached: on a machine with a network run "
            f"`hf download {name}`, copy the folder here and pass its path"
        )
    return error


def _convention(checkpoint: Mapping[str, Any], trained_by_dino: bool = False) -> str:
    """Return how the library that wrote these keys resamples positions (see :mod:`maskattn.nn.positions`).

    DINO, iBOT, HIPT and DINOv2 shift by 0.1 token; timm, and the released DINOv2 models with registers, antialias
    instead. A file that DINO wrote for its backbone alone looks like timm's and is treated as such.
    """
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return _convention(checkpoint[wrapper], trained_by_dino or wrapper in ("teacher", "student"))
    keys = list(map(str, checkpoint))
    if any(key.endswith("register_tokens") for key in keys):
        return "timm"
    return "dino" if trained_by_dino or any(map(_OF_DINO.search, keys)) else "timm"


def unwrapped(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict that a training checkpoint holds, or the checkpoint itself if it is one."""
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return unwrapped(checkpoint[wrapper])
    return checkpoint


def _own_keys(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the encoder's tensors, without prefixes, and the projection of an image tower."""
    found = [(key.removesuffix(end), end) for key in checkpoint for end in _EMBEDDINGS if key.endswith(end)]
    if len(found) != 1:
        if any(key.endswith("embeddings.cls_token") for key in checkpoint):
            refuse(name, ["its keys are transformers'; load its folder, or use from_transformers"])
        refuse(
            name,
            [
                f"an encoder must have one key that ends in {', '.join(_EMBEDDINGS)}, got "
                f"{[prefix + end for prefix, end in found]}"
            ],
        )
    prefix = found[0][0]
    own = {
        key.removeprefix(prefix): x
        for key, x in checkpoint.items()
        if key.startswith(prefix) and isinstance(x, Tensor) and not _LEFT_OUT.match(key.removeprefix(prefix))
    }
    return own | with_projection(checkpoint, prefix, name)


def _own_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of DINOv2's code, HIPT and encoders of embeddings to timm's."""
    renamed = {}
    for key, x in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)  # DINOv2 saves blocks in chunks
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        key = re.sub(r"^(?:phi|patch_embed)\.0\.", "patch_embed.proj.", key)
        renamed[{"register_tokens": "reg_token"}.get(key, key)] = x
    weight = renamed["patch_embed.proj.weight"]
    if weight.ndim == 2:
        renamed["patch_embed.proj.weight"] = weight[:, :, None, None]
    if "register_tokens" in state:
        # DINOv2 adds positions before it inserts registers, so the class token's position is added to the token here.
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def _arguments(state: dict[str, Tensor], name: str, img_size: int | tuple[int, int] | None) -> dict[str, Any]:
    weight = state["patch_embed.proj.weight"]
    dim, in_chans, patch_size, _ = weight.shape
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    class_token = "cls_token" in state
    positions = state["pos_embed"].shape[1] if "pos_embed" in state else 1
    if img_size is None:
        side = _square_side(positions, int(class_token) + registers, name) * patch_size
        img_size = (side, side)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    gated = "blocks.0.mlp.fc1_g.weight" in state
    hidden = state["blocks.0.mlp.fc1_g.weight" if gated else "blocks.0.mlp.fc1.weight"]
    packed = not gated and len(hidden) == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    pools = {"attn_pool.latent": "map", "attn_pool.query": "coca"}
    pool = next((pool for key, pool in pools.items() if key in state), "token" if class_token else "avg")
    return {
        "img_size": (height, width),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "global_pool": pool,
        "embed_dim": dim,
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        # Half a feature is added so that int(dim · ratio) gives this count however the division rounds.
        "mlp_ratio": (len(hidden) + 0.5) / dim,
        "mlp_layer": "swiglu" if gated else "swiglu_packed" if packed else "mlp",
        "act_layer": "silu" if gated or packed else "gelu",
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "scale_attn_norm": "blocks.0.attn.norm.weight" in state,
        "scale_mlp_norm": "blocks.0.mlp.norm.weight" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "class_token": class_token,
        "reg_tokens": registers,
        "no_embed_class": positions == (height // patch_size) * (width // patch_size),
        "pos_embed": "learn" if "pos_embed" in state else "none",
        "pre_norm": "norm_pre.weight" in state,
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
        "fc_norm": "fc_norm.weight" in state,
        "pool_dim": state["attn_pool.query"].shape[-1] if pool == "coca" else None,
    }


def _square_side(positions: int, num_prefix: int, name: str) -> int:
    """Return the side of the square grid of these positions, which may include those of the prefix tokens."""
    for count in (positions - num_prefix, positions):
        if count > 0 and math.isqrt(count) ** 2 == count:
            return math.isqrt(count)
    refuse(
        name,
        [f"{positions} positions do not form a square grid, with or without {num_prefix} prefix tokens; pass img_size"],
    )
    raise AssertionError("refuse raises")
