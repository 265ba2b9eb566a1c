from __future__ import annotations

import numpy as np
import torch
from small_vits import random_vit, sample

from maskattn.explain import CDAM, IntegratedCDAM
from maskattn.explain.pixel_maps import explain_pixels


def test_arrays_go_in_and_pixels_come_out_whose_sum_is_that_of_the_tokens():
    model, (x, keep) = random_vit(), sample()
    pixels = explain_pixels(model=model, inputs=x.numpy(), targets=np.array([1, 3]), keep=keep)
    assert pixels.shape == (2, 1, 64, 64)
    maps = CDAM(model).attribute(x, torch.tensor([1, 3]), keep).numpy()
    for row, column in ((0, 0), (2, 3)):
        inside = pixels[:, 0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        np.testing.assert_allclose(inside.sum(axis=(1, 2)), maps[:, row, column], rtol=1e-10, atol=1e-14)
        assert (inside == inside[:, :1, :1]).all()


def test_every_method_and_its_options_can_be_asked_for():
    model, (x, _) = random_vit(), sample()
    options = {"m": 2, "path": "norm"}
    pixels = explain_pixels(model, x.numpy(), 2, method=IntegratedCDAM, method_options=options, device="cpu")
    maps = IntegratedCDAM(model, m=2, path="norm").attribute(x, 2).numpy()
    np.testing.assert_allclose(pixels[:, 0, ::16, ::16] * 256, maps, rtol=1e-10)
