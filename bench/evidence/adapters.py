"""Models of timm and transformers compared with their packed twins: parity, speed and refusals.

    python -m bench.evidence.adapters --out bench/results/adapters.md      some minutes on two cores
    python -m bench.evidence.adapters --smoke                              seconds, to check that it runs

All weights are random. Parity is measured in float64: a packed model must equal the original's own code run on only the
kept tokens. Speed is measured in float32, in one process, alternating between the original and ours, as medians; ratios
above 1 mean that ours is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "nn"))

from families import FAMILIES, Family, Size, timm_vit  # noqa: E402 (tests/nn must be on the path first)

import bench.without_torchvision  # noqa: E402, F401 (before timm)
from bench.timing import medians  # noqa: E402 (after the tests' own folder)
from maskattn.nn import from_timm, from_transformers  # noqa: E402 (after the tests' own folder)

KEPT = (0.3, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to which the tables are also written")
    parser.add_argument("--smoke", action="store_true", help="two families, tiny, one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="families whose name contains this")
    arguments = parser.parse_args()
    families = [family for family in FAMILIES if arguments.only in family.name]
    size, batch, rounds = Size(224, 16, 384, 4, 6, 10), 4, arguments.rounds
    if arguments.smoke:
        families, size, batch, rounds = [families[0], families[-1]], Size(), 2, 1
    sections = [
        header(size, batch),
        parity_table(families),
        speed_table(families, size, batch, rounds),
        refused_table(),
    ]
    text = "\n\n".join(sections) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


def header(size: Size, batch: int) -> str:
    import timm
    import transformers

    return (
        "# Swapped models: parity, speed, refusals\n\n"
        f"`python -m bench.evidence.adapters`; torch {torch.__version__}, timm {timm.__version__}, transformers "
        f"{transformers.__version__}, CPU threads: {torch.get_num_threads()}. Random weights. Speed: {batch} images of "
        f"{size.img_size} px, tokens of {size.patch_size} px, {size.dim} channels, {size.depth} blocks, float32."
    )


def keep_share(batch: int, side: int, share: float) -> Tensor:
    """Draw a mask (B, side, side) that keeps the same number of tokens in each image, at random positions."""
    count = max(1, round(share * side * side))
    keep = torch.zeros(batch, side * side, dtype=torch.bool)
    return keep.scatter(1, torch.rand(batch, side * side).argsort(1)[:, :count], True).view(batch, side, side)


def parity_table(families: list[Family]) -> str:
    rows = [
        "## Parity",
        "",
        "Largest difference of the output, and of the gradient of a random functional with respect to the pixels, over "
        "the original's largest value. Masked: half of the tokens, against the original run on the kept tokens alone. "
        "DINOv3's angles are float32 in both.",
        "",
        "| model | output, all kept | gradient, all kept | output, masked | gradient, masked | output, masked, fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for family in families:
        torch.manual_seed(0)
        theirs = random_weights(family.original(Size())).double().eval()
        ours = family.convert(theirs)
        x, keep = torch.randn(2, 3, 64, 64, dtype=torch.float64), keep_share(2, 4, 0.5)
        cells = differences(lambda x: family.output(theirs, x), ours, x)  # noqa: B023 (called at once)
        cells += differences(lambda x: kept(family, theirs, x, keep), lambda x: ours(x, keep), x)  # noqa: B023 (called at once)
        exact = kept(family, theirs, x, keep)
        single = ours.float()(x.float(), keep)
        cells.append(((single - exact).abs().max() / exact.abs().max()).item())
        rows.append(f"| {family.name} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")
    return "\n".join(rows)


def random_weights(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def kept(family: Family, model: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    return torch.cat([family.kept_output(model, x[b : b + 1], keep[b].flatten()) for b in range(len(x))])


def differences(theirs: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], x: Tensor) -> list[float]:
    x = x.clone().requires_grad_()
    expected, got = theirs(x), ours(x)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (expected, got)]
    pairs = ((expected, got), tuple(gradients))
    return [((b - a).abs().max() / a.abs().max()).item() for a, b in pairs]


def speed_table(families: list[Family], size: Size, batch: int, rounds: int) -> str:
    rows = [
        "## Speed",
        "",
        "The original's time on whole images over ours, at the share f of tokens kept.",
        "",
        "| model | forward, f = 0.3 | forward, f = 1 | forward and backward, f = 0.3 | forward and backward, f = 1 |",
        "|---|---|---|---|---|",
    ]
    for family in families:
        torch.manual_seed(0)
        theirs = family.original(size).eval()
        ours = family.convert(theirs)
        x = torch.randn(batch, 3, size.img_size, size.img_size)
        masks = [keep_share(batch, size.img_size // size.patch_size, share) for share in KEPT]
        cells: list[float] = []
        for backward in (False, True):
            calls = [lambda: family.output(theirs, x)]  # noqa: B023 (called at once)
            calls += [lambda keep=keep: ours(x, keep) for keep in masks]  # noqa: B023 (called at once)
            steps = {str(i): training_step(c) if backward else inference(c) for i, c in enumerate(calls)}
            original, *packed = medians(steps, rounds).values()
            cells += [original / seconds for seconds in packed]
        rows.append(f"| {family.name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(rows)


def inference(call: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            call()

    return run


def training_step(call: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: call().square().mean().backward()


def refused_table() -> str:
    import timm
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    models = {
        "timm deit_tiny_distilled_patch16_224": lambda: timm.create_model("deit_tiny_distilled_patch16_224"),
        "timm, global_pool='max'": lambda: timm_vit(Size(), global_pool="max"),
        "timm, global_pool='prr'": lambda: timm_vit(Size(), global_pool="prr"),
        "timm, patch_drop_rate=0.5": lambda: timm_vit(Size(), patch_drop_rate=0.5),
        "timm, dynamic_img_pad=True": lambda: timm_vit(Size(), dynamic_img_pad=True),
        "timm, pool_include_prefix=True": lambda: timm_vit(Size(), pool_include_prefix=True),
        "timm, norm_layer='rmsnorm'": lambda: timm_vit(Size(), norm_layer="rmsnorm"),
        "timm, attn_layer='diff'": lambda: timm_vit(Size(), attn_layer="diff"),
        "timm, ParallelScalingBlock": lambda: timm_vit(
            Size(), block_fn=timm.models.vision_transformer.ParallelScalingBlock
        ),
        "transformers BEiT": lambda: transformers.BeitModel(transformers.BeitConfig(**small)),
        "transformers ViTForMaskedImageModeling": lambda: transformers.ViTForMaskedImageModeling(
            transformers.ViTConfig(**small)
        ),
    }
    rows = ["## Refused, by name", "", "| model | what the error says |", "|---|---|"]
    for name, build in models.items():
        convert = from_timm if name.startswith("timm") else from_transformers
        try:
            convert(build())
        except ValueError as error:
            rows.append(f"| {name} | {str(error).split(': ', 1)[1]} |")
        else:
            raise AssertionError(f"{name} was not refused")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
