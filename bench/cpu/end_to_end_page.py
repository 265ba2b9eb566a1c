"""The page of ``bench.cpu.end_to_end``: tables in Markdown of what it measured."""

from __future__ import annotations

from typing import Any

from bench.cpu.encoder_contenders import MASKED

__all__ = ["page"]

_TITLES = {
    "encoders": "The encoder alone",
    "real": "One real slide",
    "small": "Many small slides",
    "composed": "A composed gigapixel slide",
}


def page(measured: dict[str, Any]) -> str:
    """Return the page of everything that was measured so far, by "part, network, dtype"."""
    lines = ["# What a user waits for", "", "`python -m bench.cpu.end_to_end CMU-1-Small-Region.svs`", ""]
    for part, title in _TITLES.items():
        found = {key: value for key, value in measured.items() if key.startswith(f"{part}, ")}
        if not found:
            continue
        lines += [f"## {title}", "", _conditions(part, found), ""]
        lines += _encoders(found) if part == "encoders" else _commands(found)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _conditions(part: str, found: dict[str, Any]) -> str:
    last = list(found.values())[-1]
    rounds = sorted({value["rounds"] for value in found.values()})
    told = "processes that take turns, one batch each in a round" if part == "encoders" else "whole processes in turns"
    return (
        f"{last['cpu']}, {last['threads']} threads, torch {last['torch']}, Python {last['python']}, {last['date']}: "
        f"wall time, medians of {', '.join(map(str, rounds))} rounds of {told}, and ratios' medians in rounds."
    )


def _encoders(found: dict[str, Any]) -> list[str]:
    lines = [
        "Times as fast as the best of the others, which see all tokens. Error: of the features, as "
        "a share of their norm, against timm's in the same dtype.",
        "",
        "| network | dtype | what | ms a tile | times as fast as timm | as the best | error | to build, s | peak GiB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for key, value in found.items():
        _, network, dtype = key.split(", ")
        for row in value["rows"]:
            if row["why_not"]:
                lines.append(f"| {network} | {dtype} | {row['what']} | {row['why_not']} | | | | | |")
                continue
            mark = " (best)" if row["what"] == row["best"] else ""
            error = "" if row["what"] == MASKED else f"{row['error']:.1e}"  # other tokens give other features
            lines.append(
                f"| {network} | {dtype} | {row['what']}{mark} | {row['ms']:.2f} | {row['of_timm']:.2f} | "
                f"{row['of_best']:.2f} | {error} | {row['build_s']:.1f} | {row['peak_gib']:.2f} |"
            )
    return lines


def _commands(found: dict[str, Any]) -> list[str]:
    stages: list[str] = []
    for value in found.values():
        for row in value["rows"]:
            stages += [stage for stage in row["stages"] if stage not in stages]
    lines = [
        "f: share of the tiles' tokens that take part. Stages in seconds over all slides; start-up is what no stage "
        "accounts for: imports, the model, the end of the process. The loop is given the positions of the tiles.",
        "",
        "| network | dtype | what | slides, tiles | f | wall, s | processor, s | times as fast as the loop | "
        f"peak GiB | start-up | {' | '.join(stages)} |",
        f"|---|---|---|---|{'---:|' * (6 + len(stages))}",
    ]
    for key, value in found.items():
        _, network, dtype = key.split(", ")
        for row in value["rows"]:
            start_up = row["wall_s"] - sum(row["stages"].values())
            cells = [f"{row['stages'][stage]:.2f}" if stage in row["stages"] else "" for stage in stages]
            lines.append(
                f"| {network} | {dtype} | {row['what']} | {row['slides']}, {row['tiles']:,} | {row['kept']:.2f} | "
                f"{row['wall_s']:.2f} | {row['processor_s']:.2f} | {row['of_loop']:.2f} | {row['peak_gib']:.2f} | "
                f"{start_up:.2f} | {' | '.join(cells)} |"
            )
    return lines
