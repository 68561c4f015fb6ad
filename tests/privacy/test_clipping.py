"""The clipped sum of a whole network: against plain autograd, one unit at a time, and against Opacus's hooks."""

import math
import warnings

import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional as F

from primia_lite.config import UserError
from primia_lite.models import build
from primia_lite.privacy import clipping
from primia_lite.privacy.clipping import clipped_sum


class Residual(nn.Module):
    """What activations in place may overwrite: the output of a layer, never an input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return F.relu(out, inplace=True)


def cnn(side=12):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), Residual(), nn.Conv2d(4, 6, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * (side // 2 - 2) ** 2, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


def conv_cases():
    yield "strided", nn.Conv2d(4, 6, 3, stride=2)
    yield "rectangular", nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1))
    yield "dilated", nn.Conv2d(4, 6, 3, dilation=2, padding=2)
    yield "grouped", nn.Conv2d(4, 6, 3, groups=2, padding="same")
    yield "depthwise", nn.Conv2d(4, 4, 3, groups=4, bias=False)
    yield "pointwise", nn.Conv2d(4, 6, 1, stride=2)
    yield "reflecting", nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")


def task(model, shape, unit, n_units, seed=0):
    """Inputs, and a function that gives the losses of some rows: weighted, so that a unit's loss is a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(unit), *shape, generator=generator)
    with torch.no_grad():
        y = torch.randint(model(x[:1]).shape[-1], (len(unit),), generator=generator)
    weight = 1.0 / torch.bincount(unit, minlength=n_units)[unit]

    def losses(model, rows=slice(None)):
        return weight[rows] * F.cross_entropy(model(x[rows]), y[rows], reduction="none")

    return losses


def one_by_one(model, losses, unit, n_units, bound):
    """By one backward pass for each unit: plain torch, nothing shared with the product."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total, norms = {name: torch.zeros_like(p) for name, p in named.items()}, torch.zeros(n_units)
    for u in range(n_units):
        rows = torch.nonzero(unit == u).flatten()
        if len(rows):
            gradient = torch.autograd.grad(losses(model, rows).sum(), list(named.values()))
            norms[u] = torch.sqrt(sum((g**2).sum() for g in gradient))
            for name, g in zip(named, gradient, strict=True):
                total[name] += g * min(1.0, bound / float(norms[u]))
    return total, norms


def check(model, shape, unit, n_units, tolerance=1e-5):
    """Compare with :func:`one_by_one`, with a bound that clips half of the units."""
    losses = task(model, shape, unit, n_units)
    _, norms = one_by_one(model, losses, unit, n_units, 1.0)
    bound = float(norms[norms > 0].median())
    want, _ = one_by_one(model, losses, unit, n_units, bound)
    got, got_norms, each = clipped_sum(model, losses, unit, n_units, bound)
    torch.testing.assert_close(got_norms, norms, rtol=tolerance, atol=0)
    torch.testing.assert_close(each, losses(model).detach())
    assert not each.requires_grad and got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] - value).norm() <= tolerance * value.norm(), name
    assert all(p.grad is None for p in model.parameters())
    return got, got_norms


ONE_EACH = torch.arange(8)
SEVERAL = torch.tensor([3, 0, 1, 0, 5, 3, 3, 1, 2, 0])  # 4 owns no row


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


WAYS = {
    "rule": {},
    "materialised": {"PART_BYTES": 1, "GHOST_COST": math.inf},
    "ghost": {"PART_BYTES": 1, "GHOST_COST": 0},
    "recomputed": {"PART_BYTES": 1, "GHOST_COST": math.inf, "MATERIALISED_BYTES": 0},
    "some of each": {"GHOST_COST": math.inf, "MATERIALISED_BYTES": 4 * 8 * 40},
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way for all layers that know it, with parts of one unit."""
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(clipping, name, value)


@pytest.mark.parametrize("unit", [ONE_EACH, SEVERAL, ONE_EACH.flip(0)], ids=["one row each", "several", "reversed"])
@pytest.mark.parametrize(
    "name, model, shape",
    [("cnn", cnn, (1, 12, 12)), ("linear", lambda: nn.Linear(7, 3), (7,)), ("positions", lambda: sequence(), (5, 7))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_equals_one_unit_at_a_time(name, model, shape, unit, way):
    check(model(), shape, unit, int(unit.max()) + 1)


def sequence():
    return nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 6, bias=False), nn.Flatten())


@pytest.mark.parametrize("unit", [ONE_EACH, SEVERAL], ids=["one row each", "several"])
@pytest.mark.parametrize("layer", [pytest.param(layer, id=name) for name, layer in conv_cases()])
def test_convolutions(layer, unit, way):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), layer, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    check(model, (2, 9, 8), unit, int(unit.max()) + 1)


@pytest.mark.parametrize("name, side, n", [("cnn", 12, 16), ("ckksnet", 28, 16), ("resnet18", 16, 6)])
def test_equals_the_hooks_of_opacus(name, side, n):
    model = cnn() if name == "cnn" else build(name, 3, (1, side, side))
    if name == "cnn":
        model[3] = nn.GroupNorm(2, 4)  # the hooks can't see past what is overwritten
        model[1] = nn.ReLU()
    unit = torch.arange(n)
    losses = task(model, (1, side, side), unit, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(model, loss_reduction="sum")
        losses(wrapped).sum().backward()
    gradients = {name: p.grad_sample for name, p in model.named_parameters()}
    norms = torch.sqrt(sum(g.flatten(1).square().sum(1) for g in gradients.values()))
    wrapped.to_standard_module()
    bound = float(norms.median())
    factor = (bound / norms).clamp(max=1.0)
    got, got_norms, _ = clipped_sum(model, losses, unit, n, bound)
    torch.testing.assert_close(got_norms, norms, rtol=1e-5, atol=0)
    for name, g in gradients.items():
        want = torch.einsum("n,n...->...", factor, g)
        assert (got[name] - want).norm() <= 1e-5 * want.norm(), name


def test_no_rows_and_units_without_rows():
    model, nothing = cnn(), torch.arange(0)
    for n_units in (0, 3):
        sums, norms, each = clipped_sum(
            model,
            lambda m: F.cross_entropy(m(torch.zeros(0, 1, 12, 12)), nothing, reduction="none"),
            nothing,
            n_units,
            1,
        )
        assert norms.tolist() == [0.0] * n_units and len(each) == 0
        assert all(torch.equal(sums[name], torch.zeros_like(p)) for name, p in model.named_parameters())
    _, norms = check(model, (1, 12, 12), SEVERAL, 9)
    assert [u for u in range(9) if norms[u] == 0] == [4, 6, 7, 8]


def test_frozen_parameters_are_left_alone(way):
    model = cnn()
    for p in (*model[0].parameters(), model[4].weight, model[7].bias, model[3].norm.bias):
        p.requires_grad = False
    sums, _ = check(model, (1, 12, 12), SEVERAL, 6)
    assert sums.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sums.keys().isdisjoint({"0.weight", "0.bias", "4.weight", "7.bias", "3.norm.bias"})


def test_gradients_that_wait_are_left_alone():
    model = cnn()
    waiting = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = waiting[name].clone()
    clipped_sum(model, task(model, (1, 12, 12), ONE_EACH, 8), ONE_EACH, 8, 1.0)
    assert all(torch.equal(p.grad, waiting[name]) for name, p in model.named_parameters())


class Twice(nn.Module):
    """One layer that is called twice, and one that never is."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.idle = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(36, 3), nn.Linear(2, 2)
        for p in self.idle.parameters():
            p.requires_grad = False

    def forward(self, x):
        return self.linear(torch.tanh(self.conv(torch.tanh(self.conv(x)))).flatten(1))


@pytest.mark.parametrize("unit", [ONE_EACH, SEVERAL], ids=["one row each", "several"])
def test_a_layer_called_twice(unit, way):
    check(Twice(), (1, 6, 6), unit, int(unit.max()) + 1)


def test_a_layer_that_is_never_called_adds_nothing():
    model = Twice()
    model.idle.requires_grad_(True)
    sums, _, _ = clipped_sum(model, task(model, (1, 6, 6), ONE_EACH, 8), ONE_EACH, 8, 1.0)
    assert not sums["idle.weight"].any() and sums["conv.weight"].any()


def test_an_output_changed_by_another_hook():
    model = nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda layer, inputs, output: 2.0 * output)
    check(model, (7,), ONE_EACH, 8)


def test_channels_last(way):
    check(cnn().to(memory_format=torch.channels_last), (1, 12, 12), SEVERAL, 6)


def refused(model, match, losses=None, shape=(7,)):
    losses = losses or (lambda model: model(torch.randn(8, *shape)).flatten(1).sum(1))
    with pytest.raises(UserError, match=match):
        clipped_sum(model, losses, ONE_EACH, 8, 1.0)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor * x


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x):
        y = self.linear(x)
        x += 1.0
        return x + y


def test_what_has_no_known_gradient_is_refused():
    refused(nn.Sequential(nn.Linear(7, 3), Scale()), "Scale")
    refused(nn.Sequential(nn.utils.weight_norm(nn.Linear(7, 3))), "weight_g")
    refused(nn.Sequential(nn.BatchNorm1d(7)), "BatchNorm1d")
    refused(nn.Sequential(nn.Linear(7, 4), nn.LayerNorm(4)), "LayerNorm")
    tied = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    tied[1].weight = tied[0].weight
    refused(tied, "share")


def test_what_mixes_or_overwrites_rows_is_refused():
    refused(Overwriting(), "overwritten")
    refused(nn.Linear(7, 3), "mixes", lambda model: model(torch.randn(16, 7)).view(8, 6).sum(1))
    refused(nn.Linear(7, 3), "shape", lambda model: model(torch.randn(8, 7)).sum(1).mean())


def test_norms_that_are_not_finite_are_returned():
    model = nn.Linear(7, 3)
    x = torch.ones(8, 7)
    x[2], x[5] = float("inf"), float("nan")
    _, norms, _ = clipped_sum(model, lambda model: model(x).sum(1), ONE_EACH, 8, 1.0)
    assert torch.isfinite(norms).tolist() == [u not in (2, 5) for u in range(8)]
