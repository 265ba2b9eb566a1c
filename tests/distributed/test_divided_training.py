"""Training on divided slides: with DistributedDataParallel on a mesh, and what happens if a process fails."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from distributed.divided_slides import GRID_HW, head_named, part_of, rows_of, slide, trained_step
from distributed.processes import run_in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from maskattn.errors import GroupError
from maskattn.nn import TileGrid


def on_mesh(rank: int) -> dict[str, Any]:
    """The gradients of two slides on two processes each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("slide", "tiles"))
    embeddings, grid = slide(seed=rank // 2)
    rows = rows_of((0.3, 0.7), rank % 2, len(embeddings))
    head = head_named("rotary")
    model = DistributedDataParallel(head)
    for _ in range(2):  # the second step runs with rebuilt buckets
        head.zero_grad()
        logits = model(embeddings[rows], grid=part_of(grid, rows, mesh.get_group("tiles")))
        (logits * (torch.arange(len(logits)) - 1.3)).sum().backward()
    return {name: x.grad for name, x in head.named_parameters()}


def test_data_parallel_training_over_a_mesh_of_slides_and_tiles_takes_the_mean_over_slides():
    alone = [trained_step(head_named("rotary"), *slide(seed=seed)) for seed in (0, 1)]
    for found in run_in_processes(on_mesh, 4):
        for name, gradient in found.items():
            expected = (alone[0][name] + alone[1][name]) / 2
            assert (gradient - expected).abs().max() <= 1e-9 * (1 + expected.abs().max()), name


def stochastic_depth(rank: int) -> tuple[Any, Any]:
    torch.manual_seed(rank)
    embeddings, grid = slide()
    rows = rows_of((0.4, 0.6), rank, len(embeddings))
    head = head_named("token", drop_path_rate=0.5).train()
    grid = part_of(grid, rows, torch.distributed.group.WORLD)
    logits = torch.stack([head(embeddings[rows], grid=grid) for _ in range(12)])
    return logits.detach(), logits.std(dim=0).max().item()


def test_stochastic_depth_drops_a_branch_in_all_processes_or_in_none():
    (first, spread), (second, _) = run_in_processes(stochastic_depth, 2)
    assert spread > 0.01
    assert torch.equal(first, second)


def step_with_dropout(embeddings: Any, grid: TileGrid, name: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return trained_step(head_named(name, attn_drop_rate=0.4).train(), embeddings, grid)


def slide_in_order() -> tuple[Any, TileGrid]:
    """The slide with its tiles row by row, as the tokens of one process are ordered."""
    embeddings, grid = slide()
    order = (grid.rows_T * GRID_HW[1] + grid.columns_T).argsort()
    return embeddings[order], TileGrid(grid.rows_T[order], grid.columns_T[order], GRID_HW)


def divided_steps_with_dropout(rank: int, shares: Any) -> list[dict[str, Any]]:
    embeddings, grid = slide_in_order()
    rows = rows_of(shares, rank, len(embeddings))
    own = part_of(grid, rows, torch.distributed.group.WORLD)
    return [step_with_dropout(embeddings[rows], own, name, 11 + rank) for name in ("token", "alibi", "map")]


def test_dropped_attention_weights_are_those_of_one_process():
    shares = (0.3, 0.0, 0.7)
    found = run_in_processes(divided_steps_with_dropout, 3, shares)
    for number, name in enumerate(("token", "alibi", "map")):
        alone = step_with_dropout(*slide_in_order(), name, 11)
        without = trained_step(head_named(name), *slide_in_order())
        assert (alone["logits"] - without["logits"]).abs().max() > 1e-3
        parts = [process[number] for process in found]
        for key, expected in alone.items():
            got = torch.cat([part[key] for part in parts]) if key == "embeddings" else parts[0][key]
            assert (got - expected).abs().max() <= 1e-9 * (1 + expected.abs().max()), (name, key)


def refused(rank: int) -> list[str]:
    embeddings, grid = slide()
    group = torch.distributed.group.WORLD
    rows = rows_of((0.4, 0.6), rank, len(embeddings))
    errors = []

    def note(head: Any, x: Any, where: TileGrid) -> None:
        with pytest.raises((ValueError, GroupError)) as raised:
            head(x, grid=where)
        errors.append(f"{type(raised.value).__name__}: {raised.value}")

    head, own = head_named("token"), part_of(grid, rows, group)
    note(head, embeddings[rows][:, : 12 - rank], own)
    note(head, embeddings, part_of(grid, slice(None), group))
    note(head, embeddings[:0], part_of(grid, slice(0, 0), group))
    wider = TileGrid(own.rows_T, own.columns_T, (9 + rank, 8), group)
    note(head, embeddings[rows], wider)
    note(head_named("token", attn_drop_rate=0.5, impl="cpu").train().float(), embeddings[rows].float(), own)
    with pytest.raises(ValueError, match="rollout multiplies the attention of all tiles"):
        head.rollout(embeddings[rows], grid=own)
    head(embeddings[rows], grid=own)  # all are still together after it
    return errors


def test_what_one_process_refuses_is_an_error_in_all_and_no_hang():
    first, second = run_in_processes(refused, 2)
    assert first[0].startswith("GroupError: ")
    assert "process 1 refused" in first[0]
    assert second[0].startswith("ValueError: a slide model reads (T, 12) embeddings")
    for errors in (first, second):
        assert "got 37 cells in several" in errors[1]
        assert "at least one tile in all processes together, got 0" in errors[2]
        assert "needs the same grid" in errors[3]
        assert "impl='cpu' has no dropout, got dropout_p=0.5" in errors[4]


def without_partner(rank: int, ends: bool) -> tuple[str, float]:
    embeddings, grid = slide()
    rows = rows_of((0.4, 0.6), rank, len(embeddings))
    head, own = head_named("token"), part_of(grid, rows, torch.distributed.group.WORLD)
    head(embeddings[rows], grid=own)
    if rank == 1:
        if not ends:
            time.sleep(8)
        return "", 0.0
    start = time.monotonic()
    with pytest.raises(GroupError, match="did not answer") as raised:
        trained_step(head, embeddings[rows], own)
    return str(raised.value), time.monotonic() - start


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "alive without a call"])
def test_a_process_that_takes_no_part_is_an_error_within_the_timeout(ends):
    message, seconds = run_in_processes(without_partner, 2, ends, timeout_s=3)[0]
    assert "look for the first error" in message
    assert seconds < 7
