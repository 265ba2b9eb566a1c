"""``maskattn explain``: draws one image with its attention and class maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from maskattn.cli.concepts import read_words
from maskattn.cli.options import Debug
from maskattn.cli.pictures import picture_path, picture_written
from maskattn.cli.reporting import errors_in_one_line, say
from maskattn.explain.methods import DEFAULT_METHOD, METHODS

__all__ = ["explain"]


def explain(
    image: Annotated[Path, typer.Argument(help="An image file.", metavar="IMAGE", show_default=False)],
    model: Annotated[
        str,
        typer.Option("--model", help="timm:NAME, hf-hub:ORG/NAME, or a file or folder of weights.", show_default=False),
    ],
    target: Annotated[
        list[int] | None, typer.Option("--target", help="A class (may be repeated); by default the three most likely.")
    ] = None,
    concept: Annotated[
        list[Path] | None, typer.Option("--concept", help="An example image of a concept (may be repeated).")
    ] = None,
    concepts: Annotated[
        Path | None,
        typer.Option("--concepts", help="Concepts in the space of the model's output: .npy, .safetensors or .csv."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="A text (may be repeated), if --model is a folder with a text tower."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            help="Factor of the cosine for concepts and prompts; by default the file's or the model's own, or 100.",
        ),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="A mask image; tokens that are entirely black are left out.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help=f"{', '.join(METHODS)}.")] = DEFAULT_METHOD,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not check the maps by predictions from their most relevant tokens.")
    ] = False,
    num_heads: Annotated[
        int | None, typer.Option("--num-heads", help="Attention heads, for a file of weights alone.")
    ] = None,
    pixel_mean: Annotated[
        tuple[float, float, float] | None,
        typer.Option("--pixel-mean", help="Mean of the pixels; by default the model's own, or ImageNet's."),
    ] = None,
    pixel_std: Annotated[
        tuple[float, float, float] | None,
        typer.Option("--pixel-std", help="Standard deviation; by default the model's own, or ImageNet's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="PNG, or folder for it; by default IMAGE_explained.png in this folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Explain the classes of one image.

    A picture shows the image, its attention and its class maps; the scores go to stdout.
    Each map is checked by predictions from its most relevant tokens; a JSON file with the picture's name has the
    results.
    """
    with errors_in_one_line(debug):
        import torch

        from maskattn.explain import Concept
        from maskattn.explain import single_image as single
        from maskattn.explain.pictures import draw_explanation
        from maskattn.explain.text_concepts import TextConcepts
        from maskattn.files import replacing
        from maskattn.lettering import drawable
        from maskattn.nn.checkpoints import load_vit

        asked = {"--target": target, "--concept": concept, "--concepts": concepts, "--prompt": prompt}
        given = [flag for flag, value in asked.items() if value]
        if len(given) > 1:
            raise ValueError(
                f"only one of {', '.join(asked)} may be given, got {' and '.join(given)}; leave the others out"
            )
        if method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
        path = picture_path(out, f"{image.stem}_explained.png", [image, *(concept or ()), *([keep] if keep else [])])
        vit = load_vit(model, num_heads=num_heads)
        mean, std = single.normalisation_of(model)
        mean, std = pixel_mean or mean, pixel_std or std
        pixels = single.read_image(image, single.size_for(vit, image))
        inputs = single.normalised(pixels, mean, std)
        kept = None if keep is None else single.read_keep(keep, vit.patch_embed.grid_of(inputs))
        targets: list[int] | Concept | TextConcepts | None = target
        if concepts or prompt:
            targets = read_words(concepts, prompt, model, temperature)
        if concept:
            own = tuple(tokens * vit.patch_embed.patch_size for tokens in vit.grid_HW)
            examples = [single.normalised(single.read_image(path, (own[0], own[1])), mean, std) for path in concept]
            targets = Concept.from_images(vit, torch.cat(examples))
        found = single.explain_image(vit, inputs, targets, kept, method, check=not no_check)
        maps = dict(zip(found.titles(), found.maps_MHW, strict=True))
        # Names that no font can draw are left out of the title.
        title = ", ".join(filter(None, (drawable(image.name), drawable(model), METHODS[method].title)))
        figure = draw_explanation(pixels, found.attention_HW, maps, title, keep_HW=None if kept is None else kept[0])
        about = {"image": image.name, "model": model, **found.as_json()}
        with picture_written(path):
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=120)
            with replacing(path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(about, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for title in found.titles():
        say(title)
    say(f"method      {found.method}")
    say(f"picture     {path}")
    say(f"figures     {path.with_suffix('.json')}")
