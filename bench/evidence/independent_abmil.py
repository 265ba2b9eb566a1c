"""ABMIL and the masked ViT as trained by `maskattn crossval`, compared with an independent ABMIL training loop.

    python -m bench.evidence.independent_abmil            # chooses the rates, trains, compares, writes the result

The cohorts are synthetic: features of 400 patients with one slide each. In a positive patient a share of the tiles is
shifted along one direction, in a random half of all patients a share is shifted along another, every patient has a
shift of its own that all tiles share, and some labels are wrong. The independent loop reads the files with h5py and
uses only torch: gated attention (Ilse et al.), AdamW, the same number of epochs, and the epoch with the lowest
validation loss. Folds, patients and features are the same for all.

Each model's learning rate is the one with the highest AUC in a cohort of its own, which is drawn with another seed and
has other directions; the cohort of the result is used for no choice. Everything is seeded.

Dimension key: T tiles, C channels.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from bench.evidence.folds_auc import auc_within_folds, cells_within_folds, difference_within_folds
from bench.evidence.independent_abmil_findings import FINDINGS
from bench.evidence.independent_loop import (
    BATCH,
    CHANNELS,
    DROPOUT,
    EPOCHS,
    PATIENCE,
    WIDTH,
    PlainABMIL,
    PlainViT,
    plain_loop,
)
from bench.evidence.rate_choice import RATES, aucs_of_rates, best_rate, table_of_rates
from maskattn.evaluation import Predictions, grouped_folds
from maskattn.evaluation.comparison import compare
from maskattn.evaluation.crossval import cross_validate, pooled
from maskattn.evaluation.report import value_text
from maskattn.evaluation.results import evaluate_predictions
from maskattn.evaluation.splits import Split
from maskattn.slide.layouts import TileFeatures, write_features
from maskattn.training.cohort import Cohort, cohort_of
from maskattn.training.settings import TrainSettings
from maskattn.training.train import predict, train_model

RESULT = Path(__file__).resolve().parents[1] / "results" / "independent_abmil.md"
PATIENTS, TILES = 400, (48, 80)
SHARE, SHIFT, WEAKER_SHIFT, OWN_SHIFT, WRONG = (0.05, 0.2), 4.0, 2.5, 0.3, 0.05
FOLDS, SEEDS = 4, (0, 1, 2, 3)
FOLDS_OF_CHOICE = 2
COHORT_OF_CHOICE, COHORT_OF_RESULT = 1, 2
LOOP, PLAIN_VIT = "independent ABMIL", "independent ViT"


def draw_cohort(folder: Path, seed: int, shift: float) -> tuple[Path, Path]:
    """Write features in TRIDENT's layout and the table of labels, and return their paths."""
    rng = np.random.default_rng(seed)
    tumour_C, other_C = np.linalg.qr(rng.normal(size=(CHANNELS, 2)))[0].T
    rows = []
    for patient in range(PATIENTS):
        label, tiles = patient % 2, int(rng.integers(*TILES))
        features_TC = rng.normal(size=(tiles, CHANNELS)) + OWN_SHIFT * rng.normal(size=CHANNELS)
        # One kind of tile lies at the beginning, the other at the end, so that no tile is both.
        features_TC[: round(rng.uniform(*SHARE) * tiles)] += shift * label * tumour_C
        features_TC[-round(rng.uniform(*SHARE) * tiles) :] += shift * int(rng.integers(2)) * other_C
        label = label if rng.random() >= WRONG else 1 - label
        side = int(np.ceil(np.sqrt(tiles)))
        write_features(
            "trident",
            folder / "features",
            TileFeatures(
                slide_id=f"s{patient:03}",
                patch_size_px=256,
                patch_size_lv0=256,
                width_px=256 * side,
                height_px=256 * side,
                spacing_lv0_um=0.5,
                spacing_um=0.5,
                coords_T2=256 * np.stack([np.arange(tiles) % side, np.arange(tiles) // side], axis=1),
                features_TC=rng.permutation(features_TC).astype(np.float32),
                layout="trident",
                source=folder,
                encoder="uni",
                token_mask="none",
            ),
        )
        rows.append([f"s{patient:03}", f"p{patient:03}", label])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["slide_id", "patient_id", "tumour"], *rows])
    return folder / "features", folder / "labels.csv"


class Ours:
    """This package's models, as `crossval` trains them."""

    def __init__(self, settings: TrainSettings, cohort: Cohort) -> None:
        self.settings, self.cohort = settings, cohort

    def train(self, candidate: str, split: Split, folder: Path) -> Predictions:
        """Train a fold."""
        return train_model(self.settings, self.cohort, split, folder).validation

    def predict(self, folder: Path, patients: tuple[str, ...]) -> Predictions:
        """Predict with a fold's model."""
        return predict(folder, self.cohort, patients)


@dataclass(frozen=True)
class Drawn:
    """A cohort that was drawn, and the bags of its patients as the independent loop reads them."""

    folder: Path
    cohort: Cohort
    bags: dict[str, Tensor]

    @classmethod
    def with_seed(cls, folder: Path, seed: int, shift: float = SHIFT) -> Drawn:
        """Draw a cohort."""
        draw_cohort(folder, seed, shift)
        cohort = cohort_of(settings_of(folder, "abmil", RATES[0], 0))
        bags = {}
        for case in cohort.cases:
            (path,) = case.slides.values()
            with h5py.File(path) as file:
                bags[case.patient_id] = torch.from_numpy(file["features"][:]).reshape(-1, CHANNELS)
        return cls(folder, cohort, bags)

    def folds(self, seed: int, folds: int) -> list[Split]:
        """Return the first folds that a seed makes."""
        return grouped_folds(self.cohort.patients, self.cohort.strata, FOLDS, seed)[:folds]


def settings_of(folder: Path, model: str, rate: float, seed: int) -> TrainSettings:
    """Return the settings of one of this package's models: the size and the epochs of the independent loop."""
    return TrainSettings(
        features=folder / "features", labels=folder / "labels.csv", task="binary", target="tumour", device="cpu",
        model=model, epochs=EPOCHS, lr=rate, batch_size=BATCH, width=WIDTH, patience=PATIENCE, seed=seed,
        schedule="constant", warmup=0.0, dropout=DROPOUT,
    )  # fmt: skip


Trained = Callable[[Drawn, float, int, int], Predictions]


def of_plain(make: Callable[[], nn.Module]) -> Trained:
    """Return the independent training of a model, which predicts the test patients of the first folds."""

    def predicted(drawn: Drawn, rate: float, seed: int, folds: int) -> Predictions:
        label_of = {case.patient_id: int(case.truth[0]) for case in drawn.cohort.cases}
        return Predictions.joined(
            [
                plain_loop(make, drawn.bags, label_of, split, rate, 100 * seed + fold).in_fold(fold)
                for fold, split in enumerate(drawn.folds(seed, folds))
            ]
        )

    return predicted


def of_ours(model: str) -> Trained:
    """Return this package's training of a model, which predicts the test patients of the first folds."""

    def predicted(drawn: Drawn, rate: float, seed: int, folds: int) -> Predictions:
        training = Ours(settings_of(drawn.folder, model, rate, seed), drawn.cohort)
        out = drawn.folder / f"{model}_{rate:g}_{seed}"
        return pooled(cross_validate(training, ["model"], drawn.folds(seed, folds), out))[0]

    return predicted


MODELS = {
    LOOP: of_plain(PlainABMIL),
    PLAIN_VIT: of_plain(PlainViT),
    "maskattn, abmil": of_ours("abmil"),
    "maskattn, vit": of_ours("vit"),
}


def chosen_rates(folder: Path, tell: Callable[[str], None]) -> tuple[dict[str, float], str]:
    """Return each model's rate with the highest AUC, and a table of all, with that rate's AUC at a weaker signal."""
    drawn = Drawn.with_seed(folder / "choice", COHORT_OF_CHOICE)
    weaker = Drawn.with_seed(folder / "weaker", COHORT_OF_CHOICE, WEAKER_SHIFT)
    aucs, at_weaker = {}, {}
    for name, predicted in MODELS.items():

        def auc_at(rate: float, of: Drawn = drawn, predicted: Trained = predicted) -> float:
            return auc_of(predicted(of, rate, SEEDS[0], FOLDS_OF_CHOICE))

        aucs[name] = aucs_of_rates(auc_at)
        at_weaker[name] = auc_at(best_rate(aucs[name]), weaker)
        tell(f"{name}: {aucs[name]}, weaker signal {at_weaker[name]:.3f}")
    return {name: best_rate(of_model) for name, of_model in aucs.items()}, table_of_rates(aucs, at_weaker)


def auc_of(predictions: Predictions) -> float:
    """Return the AUC."""
    auc = evaluate_predictions(predictions).metrics["auc"].value
    assert auc is not None, "both classes are there"
    return auc


def compared(folder: Path, rates: dict[str, float], tell: Callable[[str], None]) -> tuple[str, str]:
    """Return a table for each seed, with paired differences from the independent loop, and one over all seeds."""
    drawn = Drawn.with_seed(folder / "result", COHORT_OF_RESULT)
    lines = [
        "| seed | model | rate | AUC | Brier score | within the loop's interval | AUC less the loop's | p "
        "| mean AUC of the folds | within the loop's interval |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found: dict[str, list[Predictions]] = {name: [] for name in MODELS}
    for seed in SEEDS:
        for name, predicted in MODELS.items():
            found[name].append(predicted(drawn, rates[name], seed, FOLDS))
            both = found[LOOP][-1], found[name][-1]
            cells = " | ".join((*cells_of(*both), *cells_within_folds(*both)))
            lines.append(f"| {seed} | {name} | {rates[name]:g} | {cells} |")
            tell(lines[-1])
    return "\n".join(lines), over_seeds(found)


def over_seeds(found: dict[str, list[Predictions]]) -> str:
    """Return the table of means over all seeds."""
    lines = [
        "| model | AUC | mean AUC of the folds | less the loop's | less the independent ViT's |",
        "|---|---|---|---|---|",
    ]
    for name, predictions in found.items():
        pooled_auc = np.mean([auc_of(one) for one in predictions])
        within = np.mean([auc_within_folds(one) for one in predictions])
        less = [difference_cell(found[other], predictions) for other in (LOOP, PLAIN_VIT)]
        lines.append(f"| {name} | {pooled_auc:.3f} | {within:.3f} | {' | '.join(less)} |")
    return "\n".join(lines)


def difference_cell(first: list[Predictions], second: list[Predictions]) -> str:
    """Return the difference of the mean AUC of the folds with its interval; nothing of a model to itself."""
    if first is second:
        return ""
    difference, low, high = difference_within_folds(first, second)
    return f"{difference:.3f} ({low:.3f} to {high:.3f})".replace("-", "−")


def cells_of(loop: Predictions, predictions: Predictions) -> tuple[str, ...]:
    """Return a row's last cells: the metrics, and how the AUC stands to the independent loop's."""
    metrics = evaluate_predictions(predictions).metrics
    own = (value_text(metrics["auc"]), value_text(metrics["brier"]))
    if predictions is loop:
        return (*own, "", "", "")
    interval = evaluate_predictions(loop).metrics["auc"]
    assert interval.low is not None, "both classes are there"
    assert interval.high is not None, "both classes are there"
    within = interval.low <= auc_of(predictions) <= interval.high
    apart = compare(loop, predictions)[0]
    return (
        *own,
        "yes" if within else "no",
        value_text(apart.difference),
        "< 0.005" if apart.p < 0.005 else f"{apart.p:.2f}",
    )


def main() -> None:
    """Run it and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="the Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the bags are small
    with tempfile.TemporaryDirectory() as folder:
        rates, choice = chosen_rates(Path(folder), tell)
        by_seed, of_all = compared(Path(folder), rates, tell)
    tell(of_all)
    arguments.out.write_text(page(by_seed, of_all, choice), encoding="utf-8")


def tell(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def page(by_seed: str, of_all: str, choice: str) -> str:
    """Return the page with all tables."""
    return (
        "# ABMIL and the masked ViT against an independent ABMIL loop\n\n"
        f"Written by `python -m bench.evidence.independent_abmil`. {PATIENTS} patients, {TILES[0]} to {TILES[1]} tiles "
        f"of {CHANNELS} channels; {SHARE[0]:.0%} to {SHARE[1]:.0%} of a positive patient's tiles are moved by {SHIFT} "
        "standard deviations along one direction, as many of a random half of all patients along another, and all "
        f"tiles of a patient by {OWN_SHIFT} in every channel; {WRONG:.0%} of the labels are wrong. {FOLDS} folds, at "
        f"most {EPOCHS} epochs (all stop after {PATIENCE} without a lower validation loss), width {WIDTH}, a constant "
        "learning rate. Test patients of all folds together, 95 % bootstrap intervals over patients. A seed makes the "
        "folds, the first weights and the order; the patients are the same.\n\n"
        f"{by_seed}\n\n{of_all}\n\n"
        "The independent ViT is torch's own `nn.TransformerEncoder` with a class token, of the size of ours. The AUC "
        "is pooled over folds, and also compares patients whose scores are of different models. The mean AUC of the "
        "folds compares patients of the same model only; its differences are paired over patients, who are drawn "
        "together for all seeds. Each has its own column on whether a model is within the loop's interval.\n\n"
        f"{FINDINGS}"
        "## How the settings were chosen\n\n"
        "In another cohort, drawn in the same way with another seed and other directions; the cohort of the result was "
        "not used for any choice. Each model has the learning rate that gave it the highest AUC there, in the "
        f"{PATIENTS * FOLDS_OF_CHOICE // FOLDS} test patients of {FOLDS_OF_CHOICE} folds; the grid was extended as "
        "long as the best rate was at its edge. The strength of the signal "
        f"was set in that cohort too, so that a transformer can learn it from so few patients: the last column has the "
        f"AUC, at the chosen rate, where tiles are moved by {WEAKER_SHIFT} in place of {SHIFT}.\n\n"
        f"{choice}\n"
    )


if __name__ == "__main__":
    main()
