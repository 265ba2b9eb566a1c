"""Tables of the grading experiment: means over seeds, with intervals over seeds and over patients.

Dimension key: P patients, J resamples of the patients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from bench.evidence.cohort import GRADES
from bench.evidence.grading_arms import ARMS, EXPLAINED, MAIN, TESTS
from bench.evidence.grading_maps import MAPS

__all__ = ["ablation_table", "kappa", "kappa_table", "kappas_of_resamples", "map_table", "over_seeds", "time_line"]

Results = dict[str, dict[int, dict[str, Any]]]
_RESAMPLES = 4000
_MINUS = "\N{MINUS SIGN}"


def kappa(truth_P: list[int], predicted_P: list[int]) -> float:
    """Quadratic-weighted kappa."""
    score = cohen_kappa_score(truth_P, predicted_P, weights="quadratic", labels=list(range(GRADES)))
    return float(np.nan_to_num(score))


def kappas_of_resamples(truth_P: np.ndarray, predicted_P: np.ndarray, counts_JP: np.ndarray) -> np.ndarray:
    """Compute (J,) quadratic-weighted kappas of resamples, in which patients count several times or not at all.

    With quadratic weights, kappa is 1 − E(t − p)² / (E t² + E p² − 2 E t · E p).
    """
    t, p = truth_P.astype(np.float64), predicted_P.astype(np.float64)
    share_JP = counts_JP / counts_JP.sum(axis=1, keepdims=True)
    chance_J = share_JP @ t**2 + share_JP @ p**2 - 2 * (share_JP @ t) * (share_JP @ p)
    seen_J = share_JP @ (t - p) ** 2
    return 1 - np.divide(seen_J, chance_J, out=np.ones_like(seen_J), where=chance_J > 0)


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Compute the mean and half the width of the t distribution's 95 % interval; NaN for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def _cell(values: list[float], digits: int = 3) -> str:
    mean, half = over_seeds(values)
    text = f"{mean:.{digits}f} ± {half:.{digits}f}" if half == half else f"{mean:.{digits}f}"
    return text.replace("-", _MINUS)


def _kappas(results: Results, arm: str, test: str) -> dict[int, float]:
    return {seed: kappa(r["truth"], r["predicted"][test]) for seed, r in results.get(arm, {}).items()}


def _difference(results: Results, first: str, second: str, test: str) -> tuple[str, str]:
    """Return the difference of two arms: mean and interval over seeds, and interval over patients of that mean."""
    seeds = sorted(set(results[first]) & set(results[second]))
    of = [_kappas(results, arm, test) for arm in (first, second)]
    differences = [of[0][seed] - of[1][seed] for seed in seeds]
    truth = np.array(results[first][seeds[0]]["truth"])
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(truth), np.full(len(truth), 1 / len(truth)), _RESAMPLES)
    resampled = np.mean(
        [
            kappas_of_resamples(truth, np.array(results[first][seed]["predicted"][test]), counts)
            - kappas_of_resamples(truth, np.array(results[second][seed]["predicted"][test]), counts)
            for seed in seeds
        ],
        axis=0,
    )
    low, high = np.quantile(resampled, (0.025, 0.975))
    return _cell(differences), f"{low:.3f} … {high:.3f}".replace("-", _MINUS)


def _counts(results: Results) -> str:
    arm = results[MAIN[0]]
    patients = len(next(iter(arm.values()))["truth"])
    return f"{len(arm)} seeds, {patients} patients of two slides in each test cohort"


def kappa_table(results: Results) -> str:
    """Return the table of the main question: kappa of plain and masked in the three test cohorts, and their gap."""
    lines = ["| | " + " | ".join(TESTS) + " |", "|---" * (len(TESTS) + 1) + "|"]
    for arm in MAIN:
        cells = [_cell(list(_kappas(results, arm, test).values())) for test in TESTS]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    both = [_difference(results, "masked", "plain", test) for test in TESTS]
    lines.append("| masked less plain | " + " | ".join(seeds for seeds, _ in both) + " |")
    lines.append("| the same, 95 % over patients | " + " | ".join(patients for _, patients in both) + " |")
    return (
        f"Quadratic-weighted kappa over patients; {_counts(results)}. Mean over seeds ± half of the 95 % interval over "
        "seeds (t distribution; a seed draws its own training cohort and weights); the last row resamples the test "
        "patients instead, the same ones for every seed.\n\n" + "\n".join(lines)
    )


def ablation_table(results: Results) -> str:
    """Return the table of every stored arm's kappa."""
    lines = ["| trained and asked | seeds | " + " | ".join(TESTS) + " |", "|---" * (len(TESTS) + 2) + "|"]
    for arm in ARMS:
        if arm.name in results:
            cells = [_cell(list(_kappas(results, arm.name, test).values())) for test in TESTS]
            lines.append(f"| {arm.name} | {len(results[arm.name])} | " + " | ".join(cells) + " |")
    differences = []
    for marks in ("marks tell nothing", "marks over tissue"):
        pair = f"masked, {marks}", f"plain, {marks}"
        if set(pair) <= set(results):
            by_test = "; ".join(f"{test} {_difference(results, *pair, test)[0]}" for test in TESTS)
            differences.append(f"Masked less plain where {marks.replace('marks', 'marks in training', 1)}: {by_test}.")
    return "\n".join([*lines, "", *differences]).strip()


def map_table(results: Results) -> str:
    """Return tables of attention on glass and of each map's average precision, plain and masked, inside and outside."""
    means: dict[tuple[str, str, str], list[float]] = {}
    for arm in MAIN:
        for result in results[arm].values():
            for test, found in result["maps"].items():
                for metric, values in found.items():
                    means.setdefault((arm, test, metric), []).append(float(np.mean(values)))
    slides = {
        test: len(next(iter(results[MAIN[0]].values()))["maps"][test]["attention on glass"]) for test in EXPLAINED
    }
    glass = [
        f"| {arm} | " + " | ".join(_cell(means[arm, test, "attention on glass"]) for test in EXPLAINED) + " |"
        for arm in MAIN
    ]
    text = (
        f"Share of the three levels' joint attention on glass, {slides['inside']} slides with a lesion in each cohort; "
        "mean over seeds of the slides' mean ± half of the 95 % interval over seeds, here and below.\n\n"
        "| | inside | outside |\n|---|---|---|\n" + "\n".join(glass)
    )
    columns = [(test, where, arm) for test in EXPLAINED for where in ("whole slide", "tissue") for arm in MAIN]
    for question, output in (("tumour", "a grade above 0"), ("pattern B", "a grade above 2")):
        head = "| map | " + " | ".join(f"{test}, {where}, {arm}" for test, where, arm in columns) + " |"
        rows = [head, "|---" * (len(columns) + 1) + "|"]
        for name in (*MAPS, "random"):
            cells = [_cell(means[arm, test, f"{question}|{where}|{name}"], 2) for test, where, arm in columns]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
        text += f"\n\nAverage precision against {question}, maps of the logit of {output}:\n\n" + "\n".join(rows)
    return text


def time_line(results: Results) -> str:
    """Return the processor time of the run, in words."""
    seconds = sum(result["seconds"] for seeds in results.values() for result in seeds.values())
    count = sum(len(seeds) for seeds in results.values())
    return f"{count} trainings of {len(results)} kinds took {seconds / 60:.1f} minutes of one core's processor time."
