"""The bundled demonstration model's figures on fresh synthetic slides: ``python -m bench.evidence.demo_figures``.

The slides were used neither for training nor for choosing its recipe. For the bundled model and its unmasked twin (same
script and seed, ``--unmasked``), the page gives accuracy; the average precision (AP) with which the class map, by the
paths "norm" and "weights" and by plain CDAM, and attention alone, find the lesion's tokens; and the share
of attention on background. If the file of ``--twin`` does not exist, the twin is first trained and written there, which
takes about ten minutes.

Definitions. A token is lesion if at least half of its area is. The class map is that of tokens through both levels
(``HierarchicalCDAM``), for the slide's true class. The attention to a token is the slide encoder's attention to its
tile times the tile encoder's attention to it. Background is every token that tissue detection leaves out. AP is
computed over the tissue's tokens, which are the same for both models, and over all tokens of the slide (a masked token
scores 0), each averaged over slides with a lesion.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import sklearn
import torch
from sklearn.metrics import average_precision_score

import maskattn
from maskattn.demo.samples import SlideSample, sample_slide
from maskattn.demo.synthetic import CLASSES
from maskattn.demo.train import BUNDLED_WEIGHTS, FIRST_TRAINING_SEED, TrainingPlan, train
from maskattn.explain.hierarchical import HierarchicalCDAM
from maskattn.explain.methods import METHODS as ALL_METHODS
from maskattn.nn.slide_model import SlideModel

RESULTS = Path(__file__).parents[1] / "results"
NORM, WEIGHTS = "integrated-norm", "integrated-weights"
METHODS = (NORM, WEIGHTS, "cdam")
LESION_SHARE = 0.5
# the recipe of training was chosen on slides below this seed
FIRST_SEED = 1000
BATCH = 64


@dataclass(frozen=True)
class SlideFigures:
    """One model's results on one slide; AP is None without a lesion."""

    correct: bool
    norm_ap_tissue: float | None
    norm_ap_slide: float | None
    weights_ap_tissue: float | None
    weights_ap_slide: float | None
    cdam_ap_tissue: float | None
    cdam_ap_slide: float | None
    attention_ap_tissue: float | None
    attention_ap_slide: float | None
    attention_on_background: float


@dataclass(frozen=True)
class TokenScores:
    """A slide's logits, and class maps and attention over all tokens, (H, W, h, w), 0 at masked tokens.

    Attributes:
        logits_K: (K,), the slide's logits.
        relevance: method → map of the true class.
        attention: the product of both levels' attention.
    """

    logits_K: np.ndarray
    relevance: dict[str, np.ndarray]
    attention: np.ndarray


def explain(model: SlideModel, sample: SlideSample) -> TokenScores:
    keep_HW = torch.from_numpy(sample.grid.keep_HW)
    tiles = torch.from_numpy(sample.tiles_TCHW).split(BATCH)
    tokens = torch.from_numpy(sample.grid.token_keep_THW).split(BATCH)
    with torch.no_grad():
        embeddings = torch.cat([model.encode_tiles(*batch) for batch in zip(tiles, tokens, strict=True)])
    relevance = {}
    for method in METHODS:
        explainer = HierarchicalCDAM(model, method)
        of_slide = explainer.tiles(embeddings, keep_HW)
        gradients = of_slide.gradient_KTC.split(BATCH, dim=1)
        maps = [explainer.tokens(*batch) for batch in zip(tiles, tokens, gradients, strict=True)]
        relevance_THW = torch.cat([of_batch.relevance_KBHW[sample.label] for of_batch in maps])
        relevance[method] = spread(sample, relevance_THW.numpy())
    attention_THW = torch.cat([of_batch.attention_BHW for of_batch in maps]) * of_slide.attention_T[:, None, None]
    return TokenScores(of_slide.logits_K.numpy(), relevance, spread(sample, attention_THW.numpy()))


def spread(sample: SlideSample, values_THW: np.ndarray) -> np.ndarray:
    """Place values of the kept tiles' tokens (T, h, w) on the slide's full grid (H, W, h, w); 0 elsewhere."""
    grid = np.zeros((*sample.grid.keep_HW.shape, *values_THW.shape[1:]), values_THW.dtype)
    grid[sample.grid.keep_HW] = values_THW
    return grid


def judge(scores: TokenScores, label: int, tissue: np.ndarray, lesion: np.ndarray) -> SlideFigures:
    def precision(values: np.ndarray, where: np.ndarray) -> float | None:
        return float(average_precision_score(lesion[where], values[where])) if lesion.any() else None

    everywhere = np.ones_like(tissue)
    return SlideFigures(
        correct=int(scores.logits_K.argmax()) == label,
        norm_ap_tissue=precision(scores.relevance[NORM], tissue),
        norm_ap_slide=precision(scores.relevance[NORM], everywhere),
        weights_ap_tissue=precision(scores.relevance[WEIGHTS], tissue),
        weights_ap_slide=precision(scores.relevance[WEIGHTS], everywhere),
        cdam_ap_tissue=precision(scores.relevance["cdam"], tissue),
        cdam_ap_slide=precision(scores.relevance["cdam"], everywhere),
        attention_ap_tissue=precision(scores.attention, tissue),
        attention_ap_slide=precision(scores.attention, everywhere),
        attention_on_background=float(scores.attention[~tissue].sum() / scores.attention.sum()),
    )


def summarise(values: list[float]) -> dict[str, float]:
    """Compute the mean and its standard error."""
    return {"mean": float(np.mean(values)), "se": float(np.std(values, ddof=1) / len(values) ** 0.5), "n": len(values)}


def measure(models: dict[str, SlideModel], slides: int, say: Callable[[str], None]) -> dict[str, dict]:
    """Compute the figures of each model over ``slides`` fresh slides, cycling through the classes."""
    figures: dict[str, list[SlideFigures]] = {name: [] for name in models}
    context: dict[str, list[float]] = {"lesion / tissue tokens": [], "lesion / all tokens": [], "background / all": []}
    for index in range(slides):
        seed, label = FIRST_SEED + index, index % len(CLASSES)
        samples = {masked: sample_slide(seed, masked=masked, label=label) for masked in (True, False)}
        tissue = spread(samples[True], samples[True].grid.token_keep_THW)
        lesion = spread(samples[False], samples[False].lesion_THW >= LESION_SHARE)
        if lesion.any():
            context["lesion / tissue tokens"].append(float(lesion[tissue].mean()))
            context["lesion / all tokens"].append(float(lesion.mean()))
        context["background / all"].append(float((~tissue).mean()))
        for name, model in models.items():
            scores = explain(model, samples[model.config.masked])
            figures[name].append(judge(scores, label, tissue, lesion))
        if index % 10 == 9:
            say(f"{index + 1} of {slides} slides")
    result = {name: {field: summarise(values_of(rows, field)) for field in FIELDS} for name, rows in figures.items()}
    paired = {
        name: {pair: summarise(differences(rows, *pair.split(" − "))) for pair in PAIRS}
        for name, rows in figures.items()
    }
    return {
        **result,
        "paired": paired,
        "context": {name: summarise(values) for name, values in context.items()},
    }


FIELDS = {
    "correct": "accuracy",
    "norm_ap_tissue": f"{ALL_METHODS[NORM].title} finds the lesion, AP over tissue tokens",
    "weights_ap_tissue": f"{ALL_METHODS[WEIGHTS].title}, AP over tissue tokens",
    "cdam_ap_tissue": "plain CDAM, AP over tissue tokens",
    "attention_ap_tissue": "attention alone, AP over tissue tokens",
    "norm_ap_slide": f"{ALL_METHODS[NORM].title} finds the lesion, AP over all tokens",
    "weights_ap_slide": f"{ALL_METHODS[WEIGHTS].title}, AP over all tokens",
    "cdam_ap_slide": "plain CDAM, AP over all tokens",
    "attention_ap_slide": "attention alone, AP over all tokens",
    "attention_on_background": "share of attention on background",
}


_SHORT = {
    "norm_ap_tissue": ALL_METHODS[NORM].title,
    "weights_ap_tissue": ALL_METHODS[WEIGHTS].title,
    "cdam_ap_tissue": "plain CDAM",
    "attention_ap_tissue": "attention",
}
PAIRS = (
    "norm_ap_tissue − cdam_ap_tissue",
    "norm_ap_tissue − attention_ap_tissue",
    "weights_ap_tissue − norm_ap_tissue",
)


def differences(rows: list[SlideFigures], first: str, second: str) -> list[float]:
    """Return the difference of two fields for each slide that has both."""
    return [a - b for a, b in zip(values_of(rows, first), values_of(rows, second), strict=True)]


def values_of(rows: list[SlideFigures], field: str) -> list[float]:
    return [float(value) for value in (getattr(row, field) for row in rows) if value is not None]


def load_twin(path: Path, say: Callable[[str], None]) -> SlideModel:
    """Load the unmasked twin from ``path``; train it and write it there if the file does not exist."""
    if not path.exists():
        say(f"training the unmasked twin, which is written to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        twin, _ = train(TrainingPlan(masked=False), say)
        twin.save(path, dtype=torch.float16)
    return SlideModel.load(path)


def table(results: dict) -> str:
    """Return the results as a Markdown page."""

    def cell(entry: dict[str, float]) -> str:
        return f"{entry['mean']:.3f} ± {entry['se']:.3f}" if entry["mean"] else "0 (exactly)"

    lines = [
        "# Figures of the demonstration model",
        "",
        f"`{results['command']}`, {results['date']}, {results['cpu']}, {results['threads']} threads, "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + f". {results['slides']} fresh slides, classes in turn; mean ± standard error over slides.",
        "",
        "| | masked (bundled) | unmasked twin |",
        "|---|---|---|",
    ]
    masked, twin = results["figures"]["masked"], results["figures"]["unmasked twin"]
    lines += [f"| {name} | {cell(masked[field])} | {cell(twin[field])} |" for field, name in FIELDS.items()]
    lines += [
        "",
        "| paired, slide by slide, AP over tissue tokens | masked (bundled) | unmasked twin |",
        "|---|---|---|",
    ]
    for pair in PAIRS:
        names = " less ".join(_SHORT[field] for field in pair.split(" − "))
        paired = [results["figures"]["paired"][model][pair] for model in ("masked", "unmasked twin")]
        lines.append(f"| {names} | " + " | ".join(f"{x['mean']:+.3f} ± {x['se']:.3f}" for x in paired) + " |")
    lines += ["", "| context | |", "|---|---|"]
    lines += [f"| {name} | {cell(entry)} |" for name, entry in results["figures"]["context"].items()]
    definitions = (__doc__ or "").partition("Definitions. ")[2].strip().replace("\n", " ")
    return "\n".join([*lines, "", definitions, ""])


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_WEIGHTS)
    parser.add_argument("--twin", type=Path, default=Path("build/demo_twin.safetensors"))
    parser.add_argument("--slides", type=int, default=90)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for demo_figures.json and demo_figures.md")
    options = parser.parse_args()
    if not 2 * len(CLASSES) <= options.slides <= FIRST_TRAINING_SEED - FIRST_SEED:
        parser.error(f"--slides must be {2 * len(CLASSES)} to {FIRST_TRAINING_SEED - FIRST_SEED}, got {options.slides}")

    def say(text: str) -> None:
        print(text, flush=True)

    models = {"masked": SlideModel.load(options.model), "unmasked twin": load_twin(options.twin, say)}
    results = {
        "command": "python -m bench.evidence.demo_figures"
        + (f" --slides {options.slides}" if options.slides != 90 else ""),
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "maskattn": maskattn.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "models": {name: model.identity() for name, model in models.items()},
        "slides": options.slides,
        "figures": measure(models, options.slides, say),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "demo_figures.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "demo_figures.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
