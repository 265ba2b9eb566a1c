"""ABMIL and the vision transformer, as trained here, beside an ABMIL and a loop that share nothing with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_lightning")

import h5py
from small_cohorts import WIDTH, write_cohort

from maskattn.evaluation.predictions import Predictions
from maskattn.evaluation.splits import Split
from maskattn.nn.slide_models.folder import load_model_folder
from maskattn.training.batches import CaseBatches
from maskattn.training.cohort import Cohort, cohort_of
from maskattn.training.models import build_head
from maskattn.training.settings import TrainSettings
from maskattn.training.train import predict, train_model, validation_split


class PlainABMIL(torch.nn.Module):
    """Ilse, Tomczak, Welling (2018), written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, 32)
        self.v, self.u = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)
        self.w, self.out = torch.nn.Linear(16, 1), torch.nn.Linear(32, 2)

    def forward(self, bag: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(bag))
        a = torch.softmax(self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))), 0)
        return self.out((a * h).sum(0))


def plain_loop(cohort: Cohort, split: Split) -> np.ndarray:
    """The scores of the test patients after a loop of its own, which reads the files by itself."""

    def read(patient: str) -> tuple[torch.Tensor, torch.Tensor]:
        (case,) = cohort.of([patient])
        with h5py.File(next(iter(case.slides.values()))) as file:
            return torch.from_numpy(file["features"][:]), torch.tensor(int(case.truth[0]))

    torch.manual_seed(0)
    model = PlainABMIL()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    bags = [read(patient) for patient in split.train]
    for _ in range(15):
        for index in np.random.default_rng(0).permutation(len(bags)):
            bag, label = bags[index]
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(bag)[None], label[None]).backward()
            optimiser.step()
    with torch.no_grad():
        return torch.stack([model(read(patient)[0]).softmax(0) for patient in split.test]).numpy()


def area(truth: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, scores))


@pytest.mark.parametrize("model", ["abmil", "vit"])
def test_a_trained_model_is_as_good_as_an_independent_loop(model: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    features, labels = write_cohort(tmp_path, patients=60, classes=2, tiles=12, seed=4)
    settings = TrainSettings(
        features=features,
        labels=labels,
        target="grade",
        task="binary",
        model=model,
        width=32,
        epochs=12,
        lr=3e-3,
        batch_size=2,
        device="cpu",
    )
    cohort = cohort_of(settings)
    outer = validation_split(cohort, 0.4, 1)
    inner = validation_split(Cohort(tuple(cohort.of(outer.train)), "binary", "grade", cohort.classes, {}), 0.25, 2)
    split = Split(inner.train, inner.validation, outer.validation)
    train_model(settings, cohort, split, tmp_path / model)
    ours: Predictions = predict(tmp_path / model, cohort, split.test)
    by_patient = dict(zip(ours.patient_ids, ours.scores_PK[:, 1], strict=True))
    scores = np.array([by_patient[patient] for patient in split.test])
    truth = np.array([int(cohort.of([patient])[0].truth[0]) for patient in split.test])
    plain = plain_loop(cohort, split)[:, 1]
    # The paired bootstrap over patients: the difference is not below 0 with 97.5 % certainty.
    rng = np.random.default_rng(0)
    differences = []
    while len(differences) < 500:
        rows = rng.integers(len(truth), size=len(truth))
        if 0 < truth[rows].sum() < len(rows):
            differences.append(area(truth[rows], scores[rows]) - area(truth[rows], plain[rows]))
    assert np.quantile(differences, 0.975) >= 0
    assert area(truth, scores) > 0.8


@pytest.mark.parametrize("model", ["abmil", "vit"])
def test_the_trainer_takes_the_steps_of_a_plain_loop(model: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    features, labels = write_cohort(tmp_path, patients=24, classes=2, tiles=12, seed=4)
    settings = TrainSettings(
        features=features, labels=labels, target="grade", task="binary", model=model, width=16, epochs=3, lr=1e-3,
        batch_size=4, dropout=0.0, schedule="constant", warmup=0.0, device="cpu",
    )  # fmt: skip
    cohort = cohort_of(settings)
    split = validation_split(cohort, 0.25, 1)
    trained = train_model(settings, cohort, split, tmp_path / "run")
    bags = {}
    for case in cohort.cases:
        with h5py.File(next(iter(case.slides.values()))) as file:
            bags[case.patient_id] = torch.from_numpy(file["features"][:]).reshape(-1, WIDTH)
    truth = {case.patient_id: int(case.truth[0]) for case in cohort.cases}
    torch.manual_seed(settings.seed)
    plain = build_head(settings, WIDTH, 2)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=settings.weight_decay)
    batches = CaseBatches(len(split.train), 4, settings.seed)
    for epoch in range(trained.best_epoch + 1):
        batches.set_epoch(epoch)
        losses = []
        for batch in batches:
            patients = [cohort.of(split.train)[draw.index].patient_id for draw in batch]
            logits = torch.stack([plain(bags[patient]) for patient in patients])
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([truth[patient] for patient in patients]))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), settings.clip)
            optimiser.step()
            losses.append(loss.item())
        assert np.mean(losses) == pytest.approx(trained.rows[epoch]["train_loss"], rel=1e-4)
    head, _ = load_model_folder(tmp_path / "run")
    for name, weight in head.state_dict().items():
        assert torch.allclose(weight, plain.state_dict()[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_class_token_passes_the_first_norm_as_a_direction_of_its_own(seed: int) -> None:
    torch.manual_seed(seed)
    vit = build_head(TrainSettings(task="binary", model="vit", width=64), WIDTH, 2).vit
    normed = vit.blocks[0].norm1(vit.cls_token).detach().flatten()
    # A token whose variance is far below the norm's epsilon would leave it near 0, and attend to all tiles alike.
    assert normed.std() == pytest.approx(1, abs=0.05)
    rows = vit.patch_embed(torch.randn(200, WIDTH)).detach()
    assert 0.5 < vit.cls_token.detach().std() / rows.std() < 4
