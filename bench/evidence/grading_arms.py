"""The arms of the grading experiment: the training data and the mask of each, and the run of one seed of an arm.

An arm's result is stored as soon as it is known, so that an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import functools
import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence.cohort import Cohort, draw_cohort
from bench.evidence.grading_maps import judge_maps
from bench.evidence.grading_model import (
    MASKED,
    PLAIN,
    Levels,
    Plan,
    Tensors,
    as_tensors,
    encode,
    grades_of,
    hipt_of,
    new_patch_encoder,
    new_upper_levels,
    probabilities,
    train_patch_encoder,
    train_upper_levels,
    whitened,
)
from maskattn.files import replacing
from maskattn.nn import VisionTransformer

__all__ = ["ARMS", "EXPLAINED", "MAIN", "TESTS", "Arm", "Bench", "result_of", "slug"]

TESTS = ("inside", "inside, marks shuffled", "outside")
EXPLAINED = ("inside", "outside")
_FIRST_TEST_SEED, _FIRST_TRAINING_SEED = 7, 1000


@dataclass(frozen=True)
class Arm:
    """One combination of training and prediction.

    Attributes:
        name: the name in tables.
        encoder: "masked", "plain" or "white" (plain, with glass set to white).
        training: levels at which background is masked in training.
        inference: levels at which background is masked in prediction.
        marks: marks of the training cohort: "telling" (informative), "silent" (uninformative) or "over tissue"
            (informative, and also over tissue, in the test cohorts as well).
        longer: factor of the plan's steps of stage 2.
        maps: whether its maps are judged.
    """

    name: str
    encoder: str
    training: Levels
    inference: Levels
    marks: str = "telling"
    longer: int = 1
    maps: bool = False


ARMS = (
    Arm("plain", "plain", PLAIN, PLAIN, maps=True),
    Arm("masked", "masked", MASKED, MASKED, maps=True),
    Arm("masked at inference alone", "plain", PLAIN, MASKED),
    Arm("masked at training alone", "masked", MASKED, PLAIN),
    Arm("tokens alone", "masked", Levels(True, False, False), Levels(True, False, False)),
    Arm("tiles alone", "plain", Levels(False, True, True), Levels(False, True, True)),
    Arm("regions alone", "plain", Levels(False, False, True), Levels(False, False, True)),
    Arm("plain, glass set to white", "white", PLAIN, PLAIN),
    Arm("plain, three times as long", "plain", PLAIN, PLAIN, longer=3),
    Arm("plain, marks tell nothing", "plain", PLAIN, PLAIN, "silent"),
    Arm("masked, marks tell nothing", "masked", MASKED, MASKED, "silent"),
    Arm("plain, marks over tissue", "plain", PLAIN, PLAIN, "over tissue"),
    Arm("masked, marks over tissue", "masked", MASKED, MASKED, "over tissue"),
)
MAIN = ("plain", "masked")


def slug(name: str) -> str:
    """Return the file name for an arm's name."""
    return re.sub(r"\W+", "_", name)


@functools.lru_cache(maxsize=2 * len(TESTS) + 3)
def _drawn(seed: int, patients: int, scanner: str, marks_tell: bool, over_tissue: bool) -> Cohort:
    """Draw a cohort; the cached test cohorts are shared by all seeds."""
    return draw_cohort(seed, patients, scanner, marks_tell=marks_tell, over_tissue=over_tissue)


class Bench:
    """Cohorts, encoders and features of one seed, each computed once.

    Args:
        seed: seed of the training cohort and of the weights; the test cohorts are the same for every seed.
        plan: the sizes.
        folder: folder for weights.
    """

    def __init__(self, seed: int, plan: Plan, folder: Path) -> None:
        self.seed, self.plan, self.folder = seed, plan, folder
        self._cohorts: dict[str, Cohort] = {}
        self._data: dict[tuple[str, bool], Tensors] = {}
        self._encoders: dict[str, VisionTransformer] = {}
        self._features: dict[tuple[str, str, bool], Tensor] = {}

    def cohort(self, name: str) -> Cohort:
        """Return a training cohort by its marks, or a test cohort by its name, optionally with " (over tissue)"."""
        if name not in self._cohorts:
            over, test = "over tissue" in name, name.startswith(TESTS)
            seed = _FIRST_TEST_SEED if test else _FIRST_TRAINING_SEED + self.seed
            patients = self.plan.test_patients if test else self.plan.patients
            self._cohorts[name] = _drawn(
                seed,
                patients,
                "outside" if name.startswith("outside") else "inside",
                not name.startswith(("silent", "inside, marks shuffled", "outside")),
                over,
            )
        return self._cohorts[name]

    def data(self, name: str, white: bool = False) -> Tensors:
        """Return a cohort in the model's input format."""
        if (name, white) not in self._data:
            self._data[name, white] = whitened(self.data(name)) if white else as_tensors(self.cohort(name))
        return self._data[name, white]

    def encoder(self, arm: Arm) -> VisionTransformer:
        """Return the encoder of stage 1; silent marks share it, because it does not learn from grades."""
        marks = "over tissue" if arm.marks == "over tissue" else "telling"
        key = f"{arm.encoder}, {marks}"
        if key not in self._encoders:
            path = self.folder / f"{slug(key)}.pt"
            if path.exists():
                encoder = new_patch_encoder()
                encoder.load_state_dict(torch.load(path, weights_only=True))
                encoder.eval().requires_grad_(False)
            else:
                data = self.data(marks, arm.encoder == "white")
                encoder = train_patch_encoder(data, arm.encoder == "masked", self.plan, self.seed)
                with replacing(path) as temporary:
                    torch.save(encoder.state_dict(), temporary)
            self._encoders[key] = encoder
        return self._encoders[key]

    def features(self, arm: Arm, name: str, mask_tokens: bool) -> Tensor:
        """Return the embeddings of a cohort's patches."""
        key = (f"{arm.encoder} {arm.marks == 'over tissue'}", name, mask_tokens)
        if key not in self._features:
            data = self.data(name, arm.encoder == "white")
            self._features[key] = encode(self.encoder(arm), data, mask_tokens)
        return self._features[key]

    def upper_levels(self, arm: Arm) -> nn.ModuleDict:
        """Return the upper levels of stage 2; arms that differ only in prediction share them."""
        levels = "".join("-+"[masked] for masked in (arm.training.tokens, arm.training.patches, arm.training.regions))
        path = self.folder / f"upper_{slug(arm.encoder)}_{levels}_{slug(arm.marks)}_{arm.longer}.pt"
        if path.exists():
            upper = new_upper_levels()
            upper.load_state_dict(torch.load(path, weights_only=True))
            return upper.eval().requires_grad_(False)
        upper = self._train_upper_levels(arm)
        with replacing(path) as temporary:
            torch.save(upper.state_dict(), temporary)
        return upper

    def _train_upper_levels(self, arm: Arm) -> nn.ModuleDict:
        data = self.data(arm.marks)
        features = self.features(arm, arm.marks, arm.training.tokens)
        plan = replace(self.plan, slide_steps=arm.longer * self.plan.slide_steps)
        return train_upper_levels(features, data.keep_patches(arm.training), data.grades_S, plan, self.seed)


def result_of(bench: Bench, arm: Arm) -> dict[str, Any]:
    """Return grades of the test patients, metrics of maps and processor time, read from an earlier run if stored."""
    path = bench.folder / f"{slug(arm.name)}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    start = time.process_time()
    upper = bench.upper_levels(arm)
    result: dict[str, Any] = {"predicted": {}, "maps": {}}
    for test in TESTS:
        name = f"{test} (over tissue)" if arm.marks == "over tissue" else test
        data = bench.data(name)
        features = bench.features(arm, name, arm.inference.tokens)
        found = probabilities(upper, features, data.keep_patches(arm.inference))
        result["predicted"][test] = grades_of(found, data.patients_S).tolist()
        if arm.maps and test in EXPLAINED:
            model = hipt_of(bench.encoder(arm), upper)
            result["maps"][test] = judge_maps(model, bench.cohort(name), arm.inference, bench.plan.explained)
    result["truth"] = (torch.arange(bench.plan.test_patients) % 6).tolist()
    result["seconds"] = time.process_time() - start
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result), encoding="utf-8")
    return result
