"""Rows of results: written as they are measured, and a table of ours against the best peer at each point.

python -m bench.gpu.record results.csv          prints the table of a CSV
"""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch

from bench.gpu.points import Case

__all__ = ["Recorder", "Row", "is_ours", "read_rows", "table"]


@dataclass(frozen=True)
class Row:
    """A contender on a case: times of one call on the device, TFLOP/s over kept tokens, memory beyond the inputs.

    ``host_us`` is the time until the call returns, which on a GPU is before the device has begun.
    """

    family: str
    direction: str
    variant: str
    batch: int
    tokens: int
    kept: float
    heads: int
    width: int
    dtype: str
    contender: str
    status: str
    reason: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    tflops: float | None = None
    gbytes_per_s: float | None = None
    host_us: float | None = None
    peak_mib: float | None = None
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """The key of the rows that it is compared with."""
        return tuple(getattr(self, field.name) for field in fields(Row)[:9])


def is_ours(contender: str) -> bool:
    """Return whether a contender is this package."""
    return contender.startswith("maskattn")


class Recorder:
    """Collects rows and appends each to a CSV at once, so that a run that is cut short keeps what it measured.

    Args:
        path: path of the CSV. If it exists, its rows are kept, except those that were left out for lack of time.
        device: "cpu" or "cuda".
        commit: name of the measured sources, where the checkout has no git history.
    """

    def __init__(self, path: Path | None, device: str, commit: str = ""):
        self.rows: list[Row] = []
        self._path = path
        self._versions = versions(device) | ({"commit": commit} if commit else {})
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self.rows = [row for row in read_rows(path) if row.status != "left out"]
            with path.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow([field.name for field in fields(Row)])
                writer.writerows([_cell(value) for value in asdict(row).values()] for row in self.rows)

    def has(self, case: Case, contender: str) -> bool:
        """Return whether an earlier call recorded the row, of the same sources on the same device."""
        wanted = (case.family, case.direction, case.variant, *asdict(case.point).values())
        return any(
            row.key == wanted
            and row.contender == contender
            and all(getattr(row, name) == value for name, value in self._versions.items())
            for row in self.rows
        )

    def add(self, case: Case, contender: str, status: str, reason: str = "", **figures: float) -> Row:
        """Record a row: status "ok", "ran" (untimed), "skipped", "failed" or "left out"."""
        what = {"family": case.family, "direction": case.direction, "variant": case.variant, **asdict(case.point)}
        reason = " ".join(reason.split())[:200]
        row = Row(**what, contender=contender, status=status, reason=reason, **figures, **self._versions)
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(_cell(value) for value in asdict(row).values())
        return row


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


@lru_cache
def versions(device: str) -> dict[str, str]:
    """Return the machine's name and the versions without which a figure is meaningless."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "absent"
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {"device": name, "torch": torch.__version__, "triton": triton_version, "commit": _commit()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {torch.get_num_threads()} threads" if names else platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV that a :class:`Recorder` wrote."""
    kinds = {field.name: str(field.type) for field in fields(Row)}

    def value(name: str, text: str) -> object:
        if text == "" and "None" in kinds[name]:
            return None
        kind = kinds[name].split(" ")[0]
        return {"int": int, "float": float, "str": str}[kind](text)

    with path.open(newline="") as file:
        return [Row(**{name: value(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def table(rows: Iterable[Row]) -> str:
    """Format each point's best of ours and best peer, the peer's time over ours, and what was not measured."""
    rows = list(rows)
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.status == "ok":
            groups.setdefault(row.key, []).append(row)
    where = {f"{row.device}; torch {row.torch}, triton {row.triton}, maskattn {row.commit}" for row in rows}
    lines = [*sorted(where), "", "| ours | p50 ms | TFLOP/s | best peer | p50 ms | peer / ours | where |"]
    lines.append("|---|---:|---:|---|---:|---:|---|")
    for key, group in groups.items():
        ours = min((row for row in group if is_ours(row.contender)), key=_p50, default=None)
        peer = min((row for row in group if _is_peer(row)), key=_p50, default=None)
        ratio = f"{_p50(peer) / _p50(ours):.2f}×" if ours and peer else "–"
        cells = [ours.contender, f"{_p50(ours):.4g}", _number(ours.tflops)] if ours else ["–"] * 3
        cells += [peer.contender, f"{_p50(peer):.4g}"] if peer else ["–"] * 2
        lines.append(f"| {' | '.join([*cells, ratio, _where(key)])} |")
    for status in ("failed", "left out", "skipped"):
        missing = [row for row in rows if row.status == status]
        if missing:
            lines += ["", f"{status}: {len(missing)}", ""]
            reasons: dict[tuple[str, str], int] = {}
            for row in missing:
                key = (row.family if status == "left out" else row.contender, row.reason)
                reasons[key] = reasons.get(key, 0) + 1
            lines += [f"- {count} × {who}: {reason}" for (who, reason), count in reasons.items()]
    return "\n".join(lines)


def _is_peer(row: Row) -> bool:
    """Return whether it is a peer; attention that ignores the mask is none, since it computes something else."""
    return not is_ours(row.contender) and (row.contender != "sdpa unmasked" or row.kept == 1.0)


def _p50(row: Row) -> float:
    assert row.p50_ms is not None
    return row.p50_ms


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _where(key: tuple[object, ...]) -> str:
    family, direction, variant, batch, tokens, kept, heads, width, dtype = key
    what = ", ".join(str(x) for x in (family, direction, variant) if x)
    return f"{what}: {batch}×{tokens}, f={kept:g}, H={heads}, D={width}, {dtype}"


if __name__ == "__main__":
    print(table(read_rows(Path(sys.argv[1]))))
