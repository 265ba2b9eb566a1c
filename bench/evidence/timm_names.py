"""Conversion of every vision transformer in timm: converted, refused for a module it needs, or wrong.

    python -m bench.evidence.timm_names --write          # bench/results/timm_names.md
    python -m bench.evidence.timm_names "vit_tiny*"      # some names, printed

Models are built narrow and two blocks deep, with random weights. A model counts as converted if its output agrees to
float rounding, as wrong if it does not, and as a fault if anything but ``UnsupportedModelError`` is raised.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import nn

import bench.without_torchvision  # noqa: F401 (before timm)
from maskattn.nn import from_timm
from maskattn.nn.adapters.conversion import UnsupportedModelError

PATTERNS = ("*vit*", "deit*", "eva*", "beit*", "siglip*", "*dino*")
# Modules of the models that may be convertible; others are built on the meta device and refused for their kind.
ROOMS = ("timm.models.vision_transformer", "timm.models.eva", "timm.models.deit")
SIZES = ({"depth": 2, "embed_dim": 96, "num_heads": 3}, {"depth": 2}, {})
RESULTS = Path(__file__).parents[1] / "results" / "timm_names.md"
TOLERANCE = 1e-4  # relative to the largest output: float32 through two blocks


def small_model(name: str) -> tuple[nn.Module, bool]:
    """Build a model as small as its arguments permit, and return it and whether its weights have values."""
    import timm

    if timm.model_entrypoint(name).__module__ in ROOMS:
        for size in SIZES[:2]:
            try:
                return timm.create_model(name, pretrained=False, **size).eval(), True
            except (AssertionError, TypeError, ValueError, RuntimeError):
                continue  # it does not take such an argument or value
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False).eval(), False


@torch.no_grad()
def verdict(name: str) -> tuple[str, str]:
    """Return a verdict ("converted", "refused", "wrong", "not run", "not built" or "fault") and the reason."""
    try:
        theirs, has_numbers = small_model(name)
    except Exception as error:
        return "not built", f"{type(error).__name__} in timm, without numbers"
    torch.manual_seed(0)
    if has_numbers:
        for p in theirs.parameters():
            nn.init.normal_(p, std=0.05)
    try:
        ours = from_timm(theirs)
    except UnsupportedModelError as error:
        return "refused", str(error).partition("VisionTransformer: ")[2]
    except Exception as error:
        return "fault", f"{type(error).__name__}: {error}"
    if not has_numbers:
        return "not run", "it cannot be built small"
    height, width = theirs.patch_embed.img_size
    x = torch.randn(1, theirs.patch_embed.proj.in_channels, height, width)
    expected, got = theirs(x), ours(x)
    error = float((got - expected).abs().max() / expected.abs().max())
    return ("converted", "") if error < TOLERANCE else ("wrong", f"off by {error:.1e} of the largest output")


def report(verdicts: dict[str, tuple[str, str]], version: str) -> str:
    """Return a page of counts, then of reasons with names, most frequent first."""
    counts = Counter(kind for kind, _ in verdicts.values())
    lines = [
        "# timm's names",
        "",
        f"`python -m bench.evidence.timm_names --write`, timm {version}: "
        f"{len(verdicts)} names of {', '.join(PATTERNS)}.",
        "",
        "| | names |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in counts.most_common()),
        "",
        "| not converted because of | names | such as |",
        "|---|---|---|",
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, (kind, why) in verdicts.items():
        if kind != "converted":
            # Numbers are replaced, because otherwise every model would have a reason of its own.
            reasons[f"{kind}: {re.sub(r'[0-9]+', 'n', why)}"].append(name)
    for why, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {why.replace('|', '/')} | {len(names)} | {', '.join(names[:3])} |")
    converted = [name for name, (kind, _) in verdicts.items() if kind == "converted"]
    return "\n".join([*lines, "", "Converted: " + ", ".join(converted) + ".", ""])


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=PATTERNS)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} beside the other results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names = sorted({name for pattern in arguments.patterns for name in timm.list_models(pattern)})
    text = report({name: verdict(name) for name in names}, timm.__version__)
    print(text)
    if arguments.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
