"""The choice of a learning rate from a grid that grows until the best rate lies inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["RATES", "aucs_of_rates", "best_rate", "table_of_rates"]

RATES = (3e-4, 1e-3, 3e-3)


def aucs_of_rates(auc_at: Callable[[float], float]) -> dict[float, float]:
    """Return the AUC at each rate of the grid 1, 3, 10, ..., extended until the best is not at its edge."""
    aucs = {rate: auc_at(rate) for rate in RATES}
    while (best := best_rate(aucs)) in (min(aucs), max(aucs)):
        grid = sorted(aucs)
        beyond = grid[1] / 10 if best == grid[0] else grid[-2] * 10
        aucs[float(f"{beyond:g}")] = auc_at(float(f"{beyond:g}"))
    return aucs


def best_rate(aucs: Mapping[float, float]) -> float:
    """Return the rate with the highest AUC, the one nearest to the middle of all if several have it."""
    grid = sorted(aucs)
    return max(grid, key=lambda rate: (aucs[rate], -abs(2 * grid.index(rate) - len(grid) + 1)))


def table_of_rates(aucs: Mapping[str, Mapping[float, float]], weaker: Mapping[str, float]) -> str:
    """Return a table of each model's AUCs, and of its AUC at the weaker signal."""
    rates = sorted({rate for of_model in aucs.values() for rate in of_model})
    lines = [
        f"| model | {' | '.join(f'rate {rate:g}' for rate in rates)} | weaker signal |",
        f"|---|{'---|' * len(rates)}---|",
    ]
    for name, of_model in aucs.items():
        cells = [f"{of_model[rate]:.3f}" if rate in of_model else "" for rate in rates]
        lines.append(f"| {name} | {' | '.join(cells)} | {weaker[name]:.3f} |")
    return "\n".join(lines)
