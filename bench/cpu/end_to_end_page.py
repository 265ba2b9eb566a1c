"""The page of ``bench.cpu.end_to_end``: tables in Markdown of what it measured."""

from __future__ import annotations

from typing import Any

from bench.cpu.encoder_contenders import MASKED

__all__ = ["FLOAT32_LOOP", "LOOP", "page"]

LOOP, FLOAT32_LOOP = "plain loop", "plain loop, float32"

_TITLES = {
    "encoders": "The encoder alone",
    "real": "One real slide",
    "small": "Many small slides",
    "composed": "A composed slide",
}
_SLIDES = {
    "real": "CMU-1-Small-Region.svs, 2,220 × 2,967 px, tiles at 20x.",
    "small": "Overlapping squares of 1,024 px of that slide, each a file of its own, tiles at 20x.",
    "composed": "{side:,} × {side:,} px, made by repeating that slide, tiles at 5x.",
}
_NETWORKS = ("ViT-S/16", "ViT-B/16", "bundled")
_DTYPES = ("float32", "bfloat16")
_PACKAGES = ("torch", "timm", "openslide-bin", "openvino", "onnxruntime")

_INTRODUCTION = """\
The plain loop is `bench/cpu/plain_loop.py`: timm, OpenSlide and a DataLoader with one worker, as TRIDENT has it, which
encodes all tokens of the same tiles and is given their positions. OpenVINO and ONNX Runtime take part in the encoder
alone. f is the share of the tiles' tokens that take part: 1 with `--token-mask none`, what the tissue fills with
`--token-mask tissue`. `maskattn infer` also finds tissue, runs the slide model, explains it and draws four maps of each
slide; "4 maps" is the loop that draws as many, as TRIDENT draws them. Processes are those that share the slides; how
many do where no device is named has changed with the commits. Of several processes the stages add up to more than the
wall time."""

_WHOLE = """\
Start-up is what no stage accounts for: imports, the model, the end of the process. It is paid once in a run, so the
columns "started" compare the sums of the stages, which is what a long run comes to."""


def page(measured: dict[str, Any]) -> str:
    """Return the page of everything that was measured so far, by "part, network, dtype"."""
    lines = [
        "# What a user waits for",
        "",
        "`python -m bench.cpu.end_to_end CMU-1-Small-Region.svs`",
        "",
        _INTRODUCTION,
    ]
    for part, title in _TITLES.items():
        found = _in_order(part, measured)
        if not found:
            continue
        lines += ["", f"## {title}", "", _conditions(part, found), ""]
        if part in _SLIDES:
            lines += [_SLIDES[part].format(side=next(iter(found.values()))["side"]), ""]
        lines += _encoders(found) if part == "encoders" else [*_commands(found), "", *_stages(found)]
    return "\n".join(lines).rstrip() + "\n"


def _in_order(part: str, measured: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    keys = [(network, dtype) for network in _NETWORKS for dtype in _DTYPES]
    return {key: measured[name] for key in keys if (name := ", ".join((part, *key))) in measured}


def _conditions(part: str, found: dict[tuple[str, str], dict[str, Any]]) -> str:
    each = list(found.values())
    told = "processes that take turns, one batch each in a round" if part == "encoders" else "whole processes in turns"
    versions = each[-1]["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)
    return (
        f"{each[-1]['cpu']}, {each[-1]['threads']} threads; Python {versions['python']}, {packages}; "
        f"{_listed(each, 'date')}, commit {_listed(each, 'commit')}. Wall time, medians of {_listed(each, 'rounds')} "
        f"rounds of {told}, and ratios' medians in rounds."
    )


def _listed(each: list[dict[str, Any]], name: str) -> str:
    """Return the distinct values of a condition, in the order in which they occur."""
    return ", ".join(dict.fromkeys(str(value[name]) for value in each))


def _encoders(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    lines = [
        "Times as fast as the best of the others, which see all tokens. Error: of the features, as "
        "a share of their norm, against timm's in the same dtype.",
        "",
        "| network | dtype | what | ms a tile | times as fast as timm | as the best | error | to build, s | peak GiB |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (network, dtype), value in found.items():
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


def _commands(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    lines = [
        _WHOLE,
        "",
        "| network | dtype | what | processes | slides, tiles | f | wall, s | processor, s | "
        "times as fast as the loop | started | started, as the loop in float32 | peak GiB |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (network, dtype), value in found.items():
        for row in value["rows"]:
            lines.append(
                f"| {network} | {dtype} | {row['what']} | {row.get('processes', 1)} | "
                f"{row['slides']}, {row['tiles']:,} | {row['kept']:.2f} | "
                f"{row['wall_s']:.2f} | {row['processor_s']:.2f} | {row['of_loop']:.2f} | "
                f"{row['of_loop_started']:.2f} | {row['of_float32_started']:.2f} | {row['peak_gib']:.2f} |"
            )
    return lines


def _stages(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Return the table of where the time goes."""
    stages: list[str] = []
    for value in found.values():
        for row in value["rows"]:
            stages += [stage for stage in row["stages"] if stage not in stages]
    lines = [
        "Where the time goes, in seconds over all slides, and of one slide after start-up. Reading is the time for "
        "which the network waits.",
        "",
        f"| network | dtype | what | start-up | {' | '.join(stages)} | one slide |",
        f"|---|---|---|{'---:|' * (2 + len(stages))}",
    ]
    for (network, dtype), value in found.items():
        for row in value["rows"]:
            worked = sum(row["stages"].values())
            began = row["wall_s"] - worked / row.get("processes", 1)
            cells = [f"{row['stages'][stage]:.2f}" if stage in row["stages"] else "" for stage in stages]
            lines.append(
                f"| {network} | {dtype} | {row['what']} | {began:.2f} | {' | '.join(cells)} | "
                f"{worked / row['slides']:.2f} |"
            )
    return lines
