"""Packed models with masks train: autocast, checkpointing, compiled, on two processes, with stochastic depth."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from maskattn.nn import VisionTransformer, drop_random_tokens, layer_groups

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
VARIANTS = [
    {},
    {"global_pool": "avg", "reg_tokens": 2},
    {"global_pool": "map", "class_token": False},
    {"global_pool": "coca", "pool_dim": 32},
    {"pos_embed": "rotary", "qk_norm": True, "mlp_layer": "swiglu", "act_layer": "silu"},
    {"pos_embed": "alibi", "init_values": 0.1},
]


def random_vit(dtype: torch.dtype = torch.float64, **arguments: object) -> VisionTransformer:
    torch.manual_seed(7)
    model = VisionTransformer(**{**SMALL, **arguments}).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.train()


def batch(B: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(11)
    keep = torch.rand(B, 4, 4) > 0.4
    keep[:, 0, 0] = True
    return torch.randn(B, 3, 64, 64, dtype=dtype), keep, torch.arange(B) % 5


def loss_and_gradients(model: nn.Module, x: Tensor, keep: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = cross_entropy(model(x, keep), target)
    return loss, list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


def assert_close(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0])
    for ours, theirs in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def numbers_saved(model: nn.Module) -> int:
    """How many numbers a forward keeps for its backward."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        model(*batch()[:2])
    return sum(saved)


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_changes_nothing_but_memory(variant):
    model = random_vit(drop_path_rate=0.5, attn_drop_rate=0.3, proj_drop_rate=0.2, **variant)
    torch.manual_seed(3)
    expected = loss_and_gradients(model, *batch())
    everything = numbers_saved(model)
    model.set_grad_checkpointing()
    torch.manual_seed(3)
    assert_close(loss_and_gradients(model, *batch()), expected)
    assert numbers_saved(model) < everything / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_under_autocast(variant):
    model, (x, keep, target) = random_vit(torch.float32, **variant), batch(dtype=torch.float32)
    exact = loss_and_gradients(model, x, keep, target)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        first = cross_entropy(model(x, keep), target)
    first.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )
    assert abs(first - exact) < 8 * torch.finfo(torch.bfloat16).eps * max(abs(exact), 1)
    optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        assert cross_entropy(model(x, keep), target) < first


@pytest.mark.parametrize("variant", VARIANTS)
def test_under_autocast_the_sums_of_blocks_stay_in_float32_as_in_timm(variant):
    model, (x, keep, _) = random_vit(torch.float32, **variant), batch(dtype=torch.float32)
    tokens = model.embed(x, keep)
    with torch.autocast("cpu", torch.bfloat16):
        rows = model.embed(x, keep).rows_TC
        assert rows.dtype == model.before_last_block(tokens).rows_TC.dtype == torch.float32
    half = model.bfloat16().embed(x.bfloat16(), keep).rows_TC
    assert half.dtype == torch.bfloat16
    assert (rows - tokens.rows_TC).norm() < (half - tokens.rows_TC).norm()


# Where a graph breaks (counting the kept tokens), dynamo itself asks activations for their .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_under_torch_compile(variant):
    model = random_vit(**variant)
    expected = loss_and_gradients(model, *batch())
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(loss_and_gradients(compiled, *batch()), expected)
    # Another mask is another number of tokens.
    x, keep, target = batch()
    keep = ~keep
    keep[:, 0, 0] = True
    assert_close(loss_and_gradients(compiled, x, keep, target), loss_and_gradients(model, x, keep, target))


def _train_on_one_of_two(rank: int, port: int, results: str, both: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(random_vit())
    x, keep, target = (part[2 * rank : 2 * rank + 2] for part in batch())
    cross_entropy(model(x, keep), target).backward()
    if rank == 0:
        torch.save([p.grad for p in model.module.parameters()], results)
    both.wait(60)
    # Without torch's destructors: that of the model can wait, with the GIL held, for a thread that waits for the GIL.
    os._exit(0)


def test_two_processes_average_the_gradients_of_their_halves(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = str(tmp_path / "gradients.pt")
    both = torch.multiprocessing.get_context("spawn").Barrier(2)
    torch.multiprocessing.spawn(_train_on_one_of_two, (port, results, both), nprocs=2)
    expected = loss_and_gradients(random_vit(), *batch())[1]
    for ours, theirs in zip(torch.load(results), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_stochastic_depth_leaves_whole_images_out_and_keeps_the_mean():
    model = random_vit(drop_path_rate=0.5, global_pool="avg")
    block, (x, keep, _) = model.blocks[-1], batch(8)
    tokens = model.embed(x, keep)
    with torch.no_grad():
        outputs = torch.stack([block(tokens.rows_TC, tokens) for _ in range(200)])
        model.eval()
        without = tokens.rows_TC
    sequence = tokens.packing.sequence_of_token
    unchanged = (outputs == without).all(dim=2)  # [runs, T]
    for b in range(8):
        of_image = unchanged[:, sequence == b]
        assert (of_image.all(dim=1) == of_image.any(dim=1)).all()
    assert 0.15 < unchanged.float().mean() < 0.35  # both branches left out: ½ · ½


def test_a_masked_training_step_predicts_dropped_tokens_from_the_others():
    """Masked-image modelling in miniature: features of what is left must say what was left out."""
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=3)
    decoder = nn.Linear(48, 3)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    colours = torch.randn(8, 3, 1, 1)
    x = colours + 0.1 * torch.randn(8, 3, 64, 64)
    tissue = torch.rand(8, 4, 4) > 0.2
    losses = []
    for _ in range(15):
        visible = drop_random_tokens(tissue, 0.5)
        assert not (visible & ~tissue).any()
        hidden = tissue & ~visible
        prediction = decoder(encoder(x, visible))  # [B, 3]
        patches = x.unfold(2, 16, 16).unfold(3, 16, 16).mean(dim=(4, 5)).permute(0, 2, 3, 1)  # [B, 4, 4, 3]
        loss = (prediction[:, None, None] - patches)[hidden].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_random_masks_leave_out_a_share_of_the_kept_tokens_of_each_image():
    keep = torch.rand(6, 8, 8) > 0.5
    keep[5] = False
    generator = torch.Generator().manual_seed(4)
    visible = drop_random_tokens(keep, 0.3, generator)
    counts = keep.sum(dim=(1, 2))
    assert torch.equal(visible.sum(dim=(1, 2)), counts - (counts * 0.3).floor().long())
    assert not (visible & ~keep).any()
    assert torch.equal(drop_random_tokens(keep, 0.3, torch.Generator().manual_seed(4)), visible)
    assert torch.equal(drop_random_tokens(keep, 0.0), keep)
    share = torch.stack([drop_random_tokens(keep[:5], 0.5) for _ in range(300)]).float().mean(dim=0)[keep[:5]]
    assert share.min() > 0.35
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\)"):
        drop_random_tokens(keep, 1.0)
    with pytest.raises(TypeError, match="bool mask"):
        drop_random_tokens(keep.float(), 0.5)


GROUPED = [
    {},
    {"reg_tokens": 2, "init_values": 0.1, "pre_norm": True},
    {"global_pool": "avg"},
    {"global_pool": "map", "class_token": False},
    {"qk_norm": True, "num_classes": 0},
]


@pytest.mark.parametrize("variant", GROUPED)
def test_layer_groups_are_timms(variant):
    optim = pytest.importorskip("timm.optim")
    model = random_vit(**variant)
    model.patch_embed.requires_grad_(False)
    model.patch_embed.proj.weight.requires_grad_()
    names = {id(p): name for name, p in model.named_parameters()}

    def described(groups: list[dict], decay: float) -> set[tuple]:
        return {(names[id(p)], round(g["lr_scale"], 9), g["weight_decay"]) for g in groups for p in g["params"]}

    theirs = optim.param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.6
    )
    ours = layer_groups(model, lr=2.0, layer_decay=0.6, weight_decay=0.1)
    assert described(ours, 0.1) == described(theirs, 0.1)
    assert all(group["lr"] == 2.0 * group["lr_scale"] for group in ours)
    with pytest.raises(ValueError, match="layer_decay must be in"):
        layer_groups(model, lr=1.0, layer_decay=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_the_packed_tokens_on_a_model_is_one_graph(variant):
    model, (x, keep, _) = random_vit(**variant), batch()
    tokens = model.embed(x, keep)

    def predict(rows_TC: Tensor) -> Tensor:
        return model.predict(model.before_last_block(tokens.with_rows(rows_TC)))

    compiled = torch.compile(predict, backend="aot_eager", fullgraph=True)
    rows = tokens.rows_TC.detach()
    torch.testing.assert_close(compiled(rows), predict(rows))
