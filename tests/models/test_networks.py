"""The networks that attacks are shown on: what they build, and that DP-SGD trains them exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite import models
from primia_lite.config import UserError
from primia_lite.data import phantom
from primia_lite.models import frozen, networks
from primia_lite.privacy.clipping import clipped_sum, trained_layers
from primia_lite.training import Training

NAMES = ["convnet", "mlp", "imprintnet"]


@pytest.mark.parametrize("size", [28, 30, 33, 64])
@pytest.mark.parametrize("name", NAMES)
def test_they_run_at_every_size(name, size):
    out = models.build(name, 3, (1, size, size))(torch.rand(2, 1, size, size))
    assert out.shape == (2, 3) and torch.isfinite(out).all()


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_the_layers_are_as_asked_for():
    kinds = [type(layer) for layer in models.build("convnet", 3, (1, 28, 28), activation="tanh")]
    assert kinds == [nn.Conv2d, nn.Tanh, nn.Conv2d, nn.Tanh, nn.Flatten, nn.Linear]
    model = models.build("convnet", 2, (1, 28, 28), activation="square", hidden=10, width=(4, 6))
    assert [type(layer) for layer in model][5:] == [nn.Linear, networks.Square, nn.Linear]
    assert shapes(model) == {
        "0.weight": (4, 1, 5, 5), "0.bias": (4,), "2.weight": (6, 4, 5, 5), "2.bias": (6,),
        "5.weight": (10, 6 * 49), "5.bias": (10,), "7.weight": (2, 10), "7.bias": (2,),
    }  # fmt: skip
    mlp = models.build("mlp", 3, (1, 28, 28), hidden=5)
    assert shapes(mlp) == {"1.weight": (5, 784), "1.bias": (5,), "3.weight": (3, 5), "3.bias": (3,)}
    malicious = shapes(models.build("imprintnet", 3, (1, 28, 28), bins=12))
    assert malicious.pop("imprint.weight") == (12, 784) and malicious.pop("imprint.bias") == (12,)
    assert malicious == {f"network.{n}": s for n, s in shapes(models.build("convnet", 3, (1, 28, 28))).items()}


@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
def test_every_activation_is_one_that_dp_trains(activation):
    for name in NAMES:
        model = models.build(name, 3, (1, 28, 28), activation=activation)
        trained_layers(model)
    x = torch.linspace(-2, 2, 9)
    reference = {"square": lambda x: x * x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    function = reference.get(activation) or getattr(F, activation)
    assert torch.equal(networks.activation_layer(activation)(x), function(x))


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_activation_is_named_with_the_choices(name):
    with pytest.raises(UserError, match="gelu"):
        models.build(name, 3, (1, 28, 28), activation="gelu")


@pytest.mark.parametrize(
    ("name", "option"),
    [("convnet", "hiden"), ("mlp", "width"), ("ckksnet", "activation"), ("resnet18", "activation"),
     ("litenet", "hidden"), ("convnet", "in_shape"), ("mlp", "seed")],
)  # fmt: skip
def test_an_unknown_option_is_named(name, option):
    with pytest.raises(UserError, match=option):
        Training(name, model_options={option: 3})  # before any film is touched
    if option not in ("in_shape", "seed"):
        with pytest.raises(UserError, match=option):
            models.build(name, 3, (1, 28, 28), **{option: 3})


def test_an_imprint_layer_shifts_the_first_logit_by_its_units():
    model = models.build("imprintnet", 3, (1, 12, 12), bins=6, gain=0.5)
    x = torch.randn(4, 1, 12, 12)
    with torch.no_grad():
        model.imprint.weight.mul_(5)  # units in all three states: off, between, saturated
        units = (x.flatten(1) @ model.imprint.weight.T + model.imprint.bias).clamp(0, 1)
        assert (units == 0).any() and (units == 1).any() and ((units > 0) & (units < 1)).any()
        shift = 0.5 * (units @ torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))
        want = model.network(x) + torch.stack([shift, torch.zeros(4), torch.zeros(4)], 1)
        torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnet", {"width": (2, 3)}),
        ("convnet", {"width": (2, 3), "hidden": 4, "activation": "silu"}),
        ("mlp", {"hidden": 4}),
        ("imprintnet", {"bins": 6, "gain": 0.5}),
    ],
)
def test_the_clipped_sum_is_that_of_autograds_gradients(name, options):
    model = models.build(name, 3, (1, 12, 12), seed=1, **options)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 12, 12, generator=generator)
    y = torch.randint(3, (6,), generator=generator)
    parameters = dict(model.named_parameters())
    each = [torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(parameters.values()))
            for i in range(6)]  # fmt: skip
    norms = torch.stack([torch.cat([g.flatten() for g in own]).norm() for own in each])
    bound = float(norms.median())  # clips half of them
    got, got_norms, losses = clipped_sum(
        model, lambda m: F.cross_entropy(m(x), y, reduction="none"), torch.arange(6), 6, bound
    )
    torch.testing.assert_close(got_norms, norms, rtol=1e-5, atol=0)
    assert losses.shape == (6,) and got.keys() == parameters.keys()
    for place, key in enumerate(parameters):
        want = sum(own[place] * min(1.0, bound / float(norm)) for own, norm in zip(each, norms, strict=True))
        assert (got[key] - want).norm() <= 1e-5 * want.norm(), key


# --- features that autograd sees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["litenet", "scatternet"])
def test_differentiable_features_are_the_features_and_have_a_slope(name, monkeypatch, tmp_path):
    monkeypatch.setattr(frozen, "PUBLIC_FILMS", 24)
    monkeypatch.setenv("PRIMIA_LITE_CACHE", str(tmp_path))
    frozen.whitening.cache_clear()
    images = phantom.generate(2, 64, seed=3).images
    want = models.features(name, images, cache=False, progress=False)
    x = torch.from_numpy(images).float().requires_grad_()
    got = models.differentiable_features(name, x)
    np.testing.assert_allclose(got.detach(), want, rtol=1e-3, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(got.shape, generator=generator)
    (slope,) = torch.autograd.grad((got * weight).sum(), x)
    assert slope.shape == x.shape and torch.isfinite(slope).all() and (slope.abs().amax((1, 2)) > 0).all()
    # The slope is the difference quotient along itself.
    step = 2.0 * slope / slope.norm()
    with torch.no_grad():
        rise = [(models.differentiable_features(name, x + s * step) * weight).sum() for s in (1, -1)]
    assert float(rise[0] - rise[1]) == pytest.approx(4.0 * float(slope.norm()), rel=0.1)
    frozen.whitening.cache_clear()


def test_networks_trained_whole_have_no_features():
    with pytest.raises(UserError, match="frozen"):
        models.differentiable_features("convnet", torch.zeros(1, 28, 28))
