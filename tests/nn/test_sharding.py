"""torch's ``fully_shard`` on each block and on the model, the usual recipe: outputs and gradients as on one process."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from maskattn.nn import VisionTransformer

WORLDS = [1, 2]


def random_vit(global_pool: str) -> VisionTransformer:
    torch.manual_seed(7)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=4, global_pool=global_pool
    ).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    keep = torch.rand(4, 4, 4) > 0.4
    keep[:, 0, 0] = True
    return torch.randn(4, 3, 32, 32, dtype=torch.float64), keep


def _train_a_share(rank: int, world: int, port: int, global_pool: str, results: str, everyone: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    model = random_vit(global_pool)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    share = 4 // world
    x, keep = (part[share * rank : share * (rank + 1)] for part in batch())
    output = model(x, keep)
    output.square().mean().backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.save((output.detach(), gradients), f"{results}.{rank}")
    everyone.wait(60)
    # Without torch's destructors, which once in a while wait for each other.
    os._exit(0)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_model_sharded_block_by_block_trains_as_an_unsharded_one(world, global_pool, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = str(tmp_path / "results.pt")
    everyone = torch.multiprocessing.get_context("spawn").Barrier(world)
    torch.multiprocessing.spawn(_train_a_share, (world, port, global_pool, results, everyone), nprocs=world)
    whole = random_vit(global_pool)
    output = whole(*batch())
    output.square().mean().backward()
    shares = [torch.load(f"{results}.{rank}") for rank in range(world)]
    torch.testing.assert_close(torch.cat([outputs for outputs, _ in shares]), output.detach())
    for _, gradients in shares:
        assert gradients.keys() == dict(whole.named_parameters()).keys()
        for name, p in whole.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")
