"""A slide's tiles divided among processes: logits, gradients and maps are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed.divided_slides import (
    DIVISIONS,
    HEADS,
    OF_TILES,
    explained,
    head_named,
    part_of,
    rows_of,
    slide,
    trained_step,
)
from distributed.processes import run_in_processes
from torch import Tensor

METHODS = ("cdam", "integrated-weights", "integrated-norm", "integrated-value")
METHODS_OF = {"token": METHODS, "avg": METHODS, "rotary": METHODS[:2], "alibi": METHODS[1:2], "gigapath": METHODS[:2]}


def everything(embeddings: Tensor, grid: Any) -> dict[Any, dict[str, Tensor]]:
    found = {}
    for name in HEADS:
        head = head_named(name)
        found[name, "step"] = trained_step(head, embeddings, grid)
        for method in METHODS_OF.get(name, ()):
            found[name, method] = explained(head, embeddings, grid, method)
    return found


def in_one_of(rank: int, divisions: Any) -> list[Any]:
    embeddings, grid = slide()
    group = torch.distributed.group.WORLD
    parts = [rows_of(shares, rank, len(embeddings)) for shares in divisions]
    return [everything(embeddings[rows], part_of(grid, rows, group)) for rows in parts]


@pytest.mark.parametrize("count", [2, 3])
def test_a_divided_slide_has_the_logits_gradients_and_maps_of_one_process(count):
    alone = everything(*slide())
    processes = run_in_processes(in_one_of, count, DIVISIONS[count])
    compared = 0
    for number, shares in enumerate(DIVISIONS[count]):
        for key, expected in alone.items():
            parts = [process[number][key] for process in processes]
            assert all(part.keys() == expected.keys() for part in parts)
            for name, whole in expected.items():
                title = f"{shares} {key} {name}"
                if name in OF_TILES:
                    found = torch.cat([part[name] for part in parts])
                else:
                    assert all(torch.equal(part[name], parts[0][name]) for part in parts), title
                    found = parts[0][name]
                difference = (found - whole).abs().max()
                assert difference <= 1e-9 * (1 + whole.abs().max()), (title, difference)
                compared += 1
    assert compared > 500
    steps = [found for (_, what), found in alone.items() if what == "step"]
    assert all(found["embeddings"].abs().max() > 1e-3 for found in steps)
    assert all(found["vit.cls_token"].abs().max() > 1e-3 for found in steps[:2])
