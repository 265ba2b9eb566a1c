"""The table of encoders: pathology encoders under the names that users know, and general vision transformers.

Each fact was read in November 2026 in the sources that the row's ``source`` names: TRIDENT (mahmoodlab/TRIDENT
a91fa84), STAMP (KatherLab/STAMP c54ce06), slide2vec (clemsgrs/slide2vec 7cfa6bf), eva (kaiko-ai/eva), LazySlide's
models (rendeirolab/lazyslide-models 0127beb, also for the licences), and the authors' own repositories.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from typing import Any

from maskattn.nn.encoders.entry import CLIP, IMAGENET, EncoderEntry, Triple

__all__ = ["ENCODERS", "entry_named", "entry_of_hub", "nearest_names"]

_HALVES: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_BIOPTIMUS: tuple[Triple, Triple] = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
_HIBOU: tuple[Triple, Triple] = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
_LUNIT: tuple[Triple, Triple] = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))

_NC_ND = "CC-BY-NC-ND-4.0"
_KAIKO = "Kaiko Non-Commercial Public License"
_OWKIN = "Owkin non-commercial"
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_MERGES_TOKENS = "it is a Swin transformer, whose tokens attend within windows and are merged from stage to stage"
_OTHER_CONCH = "its network is code of TITAN's repository, with positions and a pooler of another layout than CONCH's"


def _row(
    name: str,
    title: str,
    library: Any,
    hub_id: str,
    embed_dim: int,
    pixels: tuple[Triple, Triple],
    spacing_um: float | None,
    licence: str,
    source: str,
    *,
    pooling: Any = "token",
    tile_px: int = 224,
    patch_px: int = 224,
    **more: Any,
) -> EncoderEntry:
    return EncoderEntry(
        name,
        title,
        library,
        hub_id,
        embed_dim,
        pooling,
        *pixels,
        tile_px,
        patch_px,
        spacing_um,
        licence,
        source,
        **more,
    )


def _timm(
    name: str, title: str, hub_id: str, architecture: str, embed_dim: int, *facts: Any, **more: Any
) -> EncoderEntry:
    arguments = {"img_size": 224, **more.pop("arguments", {})}
    return _row(name, title, "timm", hub_id, embed_dim, *facts, architecture=architecture, arguments=arguments, **more)


def _kaiko(name: str, size: str, architecture: str, embed_dim: int, **more: Any) -> EncoderEntry:
    hub_id = f"1aurent/{architecture}.kaiko_ai_towards_large_pathology_fms"
    source = "kaiko-ai/towards_large_pathology_fms README, hubconf.py and LICENSE; TRIDENT"
    facts = (_HALVES, 0.5, _KAIKO, source)
    return _timm(name, f"Kaiko {size}", hub_id, architecture, embed_dim, *facts, patch_px=256, **more)


def _general(name: str, title: str, architecture: str, embed_dim: int, pixels: tuple[Triple, Triple]) -> EncoderEntry:
    """Return the entry of a timm model that was trained on photographs, and therefore has no spacing."""
    licence = ("Apache-2.0", "timm's registry") if "dinov2" in architecture else ("MIT", "timm's registry; openai/CLIP")
    facts = (pixels, None, *licence)
    return _timm(name, title, f"timm/{architecture}", architecture, embed_dim, *facts)


_MAHMOOD = "model card in mahmoodlab/UNI README; TRIDENT"
_ROWS = (
    _timm("uni", "UNI", "MahmoodLab/UNI", "vit_large_patch16_224", 1024, IMAGENET, 0.5, _NC_ND, _MAHMOOD,
          patch_px=256, gated=True, arguments={"init_values": 1e-5}),
    _timm("uni2-h", "UNI2-h", "MahmoodLab/UNI2-h", "vit_giant_patch14_224", 1536, IMAGENET, 0.5, _NC_ND, _MAHMOOD,
          patch_px=256, gated=True, arguments={
              "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
              "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8, **_SWIGLU}),
    _timm("virchow", "Virchow", "paige-ai/Virchow", "vit_huge_patch14_224", 2560, IMAGENET, 0.5, "Apache-2.0",
          "TRIDENT, STAMP (virchow_full)", pooling="token_avg", gated=True,
          arguments={"init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", **_SWIGLU}),
    _timm("virchow2", "Virchow2", "paige-ai/Virchow2", "vit_huge_patch14_224", 2560, IMAGENET, 0.5, _NC_ND,
          "TRIDENT, slide2vec", pooling="token_avg", gated=True,
          arguments={"init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375, "global_pool": "", **_SWIGLU}),
    _timm("h-optimus-0", "H-optimus-0", "bioptimus/H-optimus-0", "vit_giant_patch14_reg4_dinov2", 1536, _BIOPTIMUS, 0.5,
          "Apache-2.0", "TRIDENT, STAMP", gated=True, arguments={"global_pool": "token", "init_values": 1e-5}),
    _timm("h-optimus-1", "H-optimus-1", "bioptimus/H-optimus-1", "vit_giant_patch14_reg4_dinov2", 1536, _BIOPTIMUS, 0.5,
          _NC_ND, "TRIDENT, STAMP", gated=True, arguments={"global_pool": "token", "init_values": 1e-5}),
    _row("h0-mini", "H0-mini", "timm", "bioptimus/H0-mini", 1536, _BIOPTIMUS, 0.5, _NC_ND,
         "slide2vec, eva (the depth and width are in its hub's config.json alone)", pooling="token_avg", gated=True,
         arguments=dict(_SWIGLU)),
    _row("conch", "CONCH", "conch", "MahmoodLab/CONCH", 512, CLIP, 0.5, _NC_ND,
         "mahmoodlab/CONCH (conch_ViT-B-16.json, factory.py, vision_tower.py); TRIDENT", pooling="coca", tile_px=448,
         patch_px=512, gated=True, file="pytorch_model.bin"),
    _row("conch-v1.5", "CONCH v1.5", "transformers", "MahmoodLab/TITAN", 768, IMAGENET, 0.5, _NC_ND,
         "TRIDENT (conchv1_5.py), STAMP", pooling="own", tile_px=448, patch_px=512, gated=True, remote_code=True,
         why_not=_OTHER_CONCH),
    _row("phikon", "Phikon", "transformers", "owkin/phikon", 768, IMAGENET, 0.5, _OWKIN, "TRIDENT, slide2vec"),
    _row("phikon-v2", "Phikon-v2", "transformers", "owkin/phikon-v2", 1024, IMAGENET, 0.5, _OWKIN,
         "TRIDENT, slide2vec"),
    _timm("gigapath", "Prov-GigaPath, tile encoder", "prov-gigapath/prov-gigapath", "vit_giant_patch14_dinov2", 1536,
          IMAGENET, 0.5, "Apache-2.0 with conditions", "prov-gigapath/prov-gigapath README; TRIDENT, slide2vec",
          tile_px=256, patch_px=256, crop_px=224, gated=True, arguments={
              "patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 5.33334}),
    _row("hibou-b", "Hibou-B", "transformers", "histai/hibou-b", 768, _HIBOU, 0.5, "Apache-2.0",
         "HistAI/hibou README; slide2vec", gated=True, remote_code=True,
         why_not="its network is code that its repository brings, of which nothing can be known beforehand"),
    _row("hibou-l", "Hibou-L", "transformers", "histai/hibou-L", 1024, _HIBOU, 0.5, "Apache-2.0",
         "HistAI/hibou README; TRIDENT, slide2vec", gated=True, remote_code=True,
         why_not="its network is code that its repository brings, of which nothing can be known beforehand"),
    _kaiko("kaiko-s16", "ViT-S/16", "vit_small_patch16_224", 384),
    _kaiko("kaiko-s8", "ViT-S/8", "vit_small_patch8_224", 384),
    _kaiko("kaiko-b16", "ViT-B/16", "vit_base_patch16_224", 768),
    _kaiko("kaiko-b8", "ViT-B/8", "vit_base_patch8_224", 768),
    _kaiko("kaiko-l14", "ViT-L/14", "vit_large_patch14_reg4_dinov2", 1024, arguments={"img_size": 518}),
    _row("midnight", "Midnight-12k", "transformers", "kaiko-ai/midnight", 3072, _HALVES, 0.5, "MIT",
         "slide2vec, LazySlide", pooling="token_avg", gated=True),
    _timm("lunit-s16", "Lunit DINO ViT-S/16", "1aurent/vit_small_patch16_224.lunit_dino", "vit_small_patch16_224", 384,
          _LUNIT, 0.5, "Lunit non-commercial", "lunit-io/benchmark-ssl-pathology README; eva, LazySlide"),
    _timm("lunit-s8", "Lunit DINO ViT-S/8", "1aurent/vit_small_patch8_224.lunit_dino", "vit_small_patch8_224", 384,
          _LUNIT, 0.5, "Lunit non-commercial", "lunit-io/benchmark-ssl-pathology README; eva, TRIDENT, slide2vec"),
    _row("ctranspath", "CTransPath", "timm", "", 768, IMAGENET, 1.0, "GPL-3.0", "TRIDENT, STAMP; Xiyue-Wang/TransPath",
         pooling="avg", architecture="swin_tiny_patch4_window7_224", arguments={"embed_layer": "ConvolutionalStem"},
         weights_at="https://github.com/Xiyue-Wang/TransPath (ctranspath.pth)", why_not=_MERGES_TOKENS),
    _timm("gpfm", "GPFM", "majiabo/GPFM", "vit_large_patch14_dinov2", 1024, IMAGENET, 0.5, _NC_ND,
          "TRIDENT, slide2vec, LazySlide", file="GPFM.pth", arguments={"init_values": 1e-5}),
    _row("plip", "PLIP", "clip", "vinid/plip", 512, CLIP, None, "non-commercial",
         "STAMP, PathologyFoundation/plip README"),
    _row("quiltnet-b16", "QuiltNet-B-16", "open_clip", "wisdomik/QuiltNet-B-16", 512, CLIP, None, "MIT",
         "wisdomikezogwo/quilt1m README; LazySlide"),
    _row("quiltnet-b32", "QuiltNet-B-32", "open_clip", "wisdomik/QuiltNet-B-32", 512, CLIP, None, "MIT",
         "wisdomikezogwo/quilt1m README; LazySlide"),
    _general("dinov2-s", "DINOv2 ViT-S/14", "vit_small_patch14_dinov2.lvd142m", 384, IMAGENET),
    _general("dinov2-b", "DINOv2 ViT-B/14", "vit_base_patch14_dinov2.lvd142m", 768, IMAGENET),
    _general("dinov2-l", "DINOv2 ViT-L/14", "vit_large_patch14_dinov2.lvd142m", 1024, IMAGENET),
    _general("dinov2-g", "DINOv2 ViT-g/14", "vit_giant_patch14_dinov2.lvd142m", 1536, IMAGENET),
    _general("clip-b16", "CLIP ViT-B/16", "vit_base_patch16_clip_quickgelu_224.openai", 768, CLIP),
    _general("clip-l14", "CLIP ViT-L/14", "vit_large_patch14_clip_quickgelu_224.openai", 1024, CLIP),
)  # fmt: skip

ENCODERS: dict[str, EncoderEntry] = {entry.name: entry for entry in _ROWS}
"""The entries by name."""

# The names of TRIDENT, STAMP and slide2vec.
_ALIASES = {
    "uni-v1": "uni", "uni2": "uni2-h", "uni-v2": "uni2-h", "virchow-full": "virchow", "hoptimus0": "h-optimus-0",
    "hoptimus1": "h-optimus-1", "h0mini": "h0-mini", "conch-v1": "conch", "conch-v15": "conch-v1.5",
    "conchv15": "conch-v1.5", "conch1-5": "conch-v1.5", "phikonv2": "phikon-v2", "prov-gigapath": "gigapath",
    "kaiko-vits8": "kaiko-s8", "kaiko-vits16": "kaiko-s16", "kaiko-vitb8": "kaiko-b8", "kaiko-vitb16": "kaiko-b16",
    "kaiko-vitl14": "kaiko-l14", "midnight12k": "midnight", "midnight-12k": "midnight", "lunit": "lunit-s8",
    "lunit-vits8": "lunit-s8", "lunit-vits16": "lunit-s16", "quiltnet": "quiltnet-b32",
}  # fmt: skip


def entry_named(name: str) -> EncoderEntry | None:
    """Return the entry of a name in any spelling that users and other tools have for it; None if there is none."""
    plain = name.lower().replace("_", "-")
    return ENCODERS.get(_ALIASES.get(plain, plain))


def entry_of_hub(hub_id: str) -> EncoderEntry | None:
    """Return the entry of a repository on Hugging Face's hub; None if the table does not have it."""
    return next((entry for entry in _ROWS if entry.hub_id and entry.hub_id.lower() == hub_id.lower()), None)


def nearest_names(name: str) -> list[str]:
    """Return the names of the table that are most similar to one that is not in it."""
    plain = name.lower().replace("_", "-")
    close = difflib.get_close_matches(plain, [*ENCODERS, *_ALIASES], n=4, cutoff=0.5)
    close += [known for known in ENCODERS if plain and (known.startswith(plain[:4]) or plain in known)]
    return list(dict.fromkeys(_ALIASES.get(one, one) for one in close))[:4]
