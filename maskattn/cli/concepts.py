"""Loading of text concepts from a command's options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskattn.cli.slide_runs import Chosen
    from maskattn.explain.text_concepts import TextConcepts
    from maskattn.nn.slide_models.two_stage import TwoStageModel

__all__ = ["load_concept_model", "read_words"]


def read_words(
    file: Path | None, prompts: Sequence[str] | None, model: str | None, temperature: float | None
) -> TextConcepts:
    """Read concepts from a file of vectors, or encode texts with the text tower in the model's folder.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or no text tower, or both are given.
    """
    from maskattn.explain.text_concepts import encode_prompts, read_concepts, temperature_of

    if file is not None and prompts:
        raise ValueError("only one of --concepts and --prompt may be given, got both; leave one out")
    if prompts:
        return encode_prompts(Path(model or ""), prompts, temperature)
    assert file is not None, "one of the two is given"
    return read_concepts(file, temperature, None if model is None else temperature_of(Path(model)))


def load_concept_model(
    words: TextConcepts, best: int | None, chosen: Chosen, impl: str | None, device: str
) -> TwoStageModel:
    """Build the slide model of a run from concepts and the image tower that ``--encoder`` names.

    Args:
        words: the concepts.
        best: number of highest-scoring tiles that are pooled for each concept; None pools all.
        chosen: the command's choices of encoder and tiles.
        impl, device: as for every run.

    Raises:
        ValueError: there is neither a tower nor features, or the tower's output has another width than the concepts.
    """
    from maskattn.cli.slide_runs import device_named
    from maskattn.explain.zero_shot import zero_shot_model

    if chosen.encoder is None and not chosen.with_features:
        raise ValueError(
            "concepts need the image tower that shares their space, got none; name it with --encoder (it needs its "
            "projection), or give a folder of its features with --features"
        )
    more: dict[str, Any] = {} if chosen.num_heads is None else {"num_heads": chosen.num_heads}
    if chosen.weights is not None:
        if not str(chosen.encoder).startswith("timm:"):
            raise ValueError(
                f"--weights needs --encoder timm:NAME, got --encoder {chosen.encoder}; pass a folder or a file as "
                "--encoder itself"
            )
        # The projection into the space of the concepts is timm's classifier.
        width = words.vectors_KC.shape[1]
        more |= {"pretrained": False, "checkpoint_path": str(chosen.weights), "num_classes": width}
    model = zero_shot_model(
        None if chosen.encoder is None else str(chosen.encoder),
        words,
        best,
        spacing_um=chosen.spacing_um or 0.5,
        patch_px=chosen.patch_px,
        token_mask=chosen.token_mask,
        impl=impl,
        **more,
    )
    return model.to(device_named(device, impl))
