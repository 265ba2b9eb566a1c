from __future__ import annotations

import pytest
import torch
from dense_vit import _dense_block, _dense_tokens
from small_vits import random_vit

from maskattn.explain import AttentionMap


def test_map_is_the_class_tokens_row_of_a_dense_masked_softmax():
    model, keep = random_vit(reg_tokens=2), torch.rand(2, 4, 4) > 0.4
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    tokens, keep_all = _dense_tokens(model, x, keep)
    tokens = _dense_block(model.blocks[0], tokens, keep_all)
    block = model.blocks[1]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).view(2, 19, 3, 3, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~keep_all[:, None, None, :], float("-inf"))
    expected = scores.softmax(-1)[:, :, 0, 3:].unflatten(-1, (4, 4))
    maps = AttentionMap(model)
    torch.testing.assert_close(maps.attribute(x, keep, heads="all"), expected)
    torch.testing.assert_close(maps.attribute(x, keep), expected.mean(dim=1))
    torch.testing.assert_close(maps.attribute(x, keep, heads=[2, 0]), expected[:, [2, 0]])


def test_background_gets_exactly_no_attention_and_each_row_sums_to_one_with_its_prefix():
    model, keep = random_vit(), torch.rand(2, 4, 4) > 0.4
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    masked = AttentionMap(model).attribute(x, keep)
    assert (masked[~keep] == 0).all()
    assert (masked.sum(dim=(1, 2)) < 1).all()
    assert (AttentionMap(model).attribute(x)[~keep] > 0).all()


def test_models_without_class_token_and_wrong_heads_are_refused_and_named():
    with pytest.raises(ValueError, match="class_token=False"):
        AttentionMap(random_vit(global_pool="avg", class_token=False))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for heads in ([3], "mean"):
        with pytest.raises(ValueError, match="heads must be None, 'all' or indices in 0 … 2"):
            AttentionMap(random_vit()).attribute(x, heads=heads)
