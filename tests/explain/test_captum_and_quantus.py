"""The CDAM family called by captum and Quantus: their calls give the results of our own."""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from small_vits import random_vit, sample

from maskattn.explain import CDAM, IntegratedCDAM, SmoothCDAM
from maskattn.explain.quantus_calls import explain_for_quantus

FAMILY = {
    "CDAM": CDAM,
    "Smooth": lambda model: SmoothCDAM(model, m=2, noise=0.0),
    "Integrated": lambda model: IntegratedCDAM(model, m=2),
}
family = pytest.mark.parametrize("method", FAMILY.values(), ids=FAMILY)


@family
def test_a_tuple_of_images_gives_a_tuple_of_maps(method):
    model, (x, keep) = random_vit(), sample()
    expected = method(model).attribute(x, 1, keep)
    for more in (keep, (keep,)):
        (got,) = method(model).attribute((x,), target=1, additional_forward_args=more)
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        method(model).attribute(x, 1, additional_forward_args=None), method(model).attribute(x, 1)
    )


@family
@pytest.mark.parametrize("target", [1, torch.tensor([2, 0])], ids=["one class", "a class an image"])
def test_noise_tunnel_averages_maps_of_noisy_images(method, target):
    model, (x, keep) = random_vit(), sample()
    tunnel = captum.attr.NoiseTunnel(method(model))
    options = {"target": target, "additional_forward_args": keep, "nt_samples": 3}
    still = tunnel.attribute(x, nt_type="smoothgrad", stdevs=0.0, **options)
    torch.testing.assert_close(still, method(model).attribute(x, target, keep))
    embed, seen = model.embed, []
    model.embed = lambda images, keep: seen.append(images.detach()) or embed(images, keep)
    got = tunnel.attribute(x, nt_type="smoothgrad", stdevs=0.3, **options)
    model.embed, noisy = embed, torch.cat(seen)
    spread = (noisy - x.repeat_interleave(3, 0)).std()
    assert 0.29 < spread < 0.31
    classes = target.repeat_interleave(3) if isinstance(target, torch.Tensor) else target
    each = method(model).attribute(noisy, classes, keep.repeat_interleave(3, 0))
    torch.testing.assert_close(got, each.unflatten(0, (2, 3)).mean(dim=1))


def test_maps_are_made_under_inference_mode_and_by_noise_tunnel_there_too():
    model, (x, keep) = random_vit(), sample()
    expected = CDAM(model).attribute(x, 1, keep)
    with torch.inference_mode():
        torch.testing.assert_close(CDAM(model).attribute(x, 1, keep), expected)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (lambda x, keep: (x, keep), {}, "a tuple of one, got 2"),
        (lambda x, keep: x, {"additional_forward_args": (torch.ones(1), torch.ones(1))}, "once, got 2"),
        (lambda x, keep: x, {"additional_forward_args": torch.ones(1), "keep": torch.ones(1)}, "in addition to keep"),
    ],
)
def test_what_does_not_fit_is_named(inputs, options, message):
    model, (x, keep) = random_vit(), sample()
    with pytest.raises(ValueError, match=message):
        CDAM(model).attribute(inputs(x, keep), 1, **options)


@family
def test_quantus_gets_the_map_of_each_token_at_its_pixels(method):
    model, (x, keep) = random_vit(), sample()
    wide = torch.randn(2, 3, 64, 70, dtype=torch.float64)
    for images in (x, wide):
        pixels = explain_for_quantus(model, images.numpy(), np.array([1, 3]), method=method, keep=keep, device="cpu")
        assert pixels.shape == (2, 1, *images.shape[2:])
        maps = method(model).attribute(images, torch.tensor([1, 3]), keep)
        np.testing.assert_array_equal(pixels[:, 0, 5::16, 5:64:16], maps.numpy())
        assert not pixels[..., 64:].any()


# Quantus's own imports and numerics warn.
@pytest.mark.filterwarnings("ignore")
def test_quantus_judges_our_maps_and_tells_them_from_random_ones():
    quantus = pytest.importorskip("quantus")
    model, (x, _) = random_vit().float(), sample(3)
    x, y = x.float().numpy(), np.array([1, 0, 2])
    metric = quantus.Selectivity(patch_size=16, abs=False, normalise=False, disable_warnings=True)

    def falls(explain):
        curves = metric(model=model, x_batch=x, y_batch=y, a_batch=None, explain_func=explain, device="cpu")
        return np.mean([np.mean(curve) for curve in curves])

    def backwards(*arguments, **options):
        return -explain_for_quantus(*arguments, **options)

    assert falls(explain_for_quantus) < falls(backwards)
