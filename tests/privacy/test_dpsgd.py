"""DP-SGD: what is clipped, how much noise, who is sampled."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from primia_lite.config import TrainingError, UserError
from primia_lite.data.films import Films
from primia_lite.models import build
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.dpsgd import (
    ClippedSum,
    PhysicalBatch,
    PoissonBatch,
    Privacy,
    clipped_step,
    poisson_batches,
)
from primia_lite.privacy.linear_head import LinearGhostClipping
from primia_lite.privacy.noise import FLOAT32_MARGIN
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import Training, private_rows, shuffled_batches, train

TINY = 1e-9  # noise too small to matter


def tabular(n=40, d=6, classes=3, seed=0, scale=1.0, views=1, patients=None):
    generator = torch.Generator().manual_seed(seed)
    inputs = scale * torch.randn(n, views, d, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    owner = np.arange(n) if patients is None else np.sort(np.random.default_rng(seed).integers(patients, size=n))
    return Films(inputs, labels, owner.astype(str))


def clipped_sum(model, films, bound, unit="patient", units=None):
    """The clipped sum by one backward pass per unit: plain torch, nothing shared with the product."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    owner = films.patient_id if unit == "patient" else np.arange(len(films))
    for u in np.unique(owner) if units is None else units:
        mine = torch.from_numpy(np.flatnonzero(owner == u))
        each = [F.cross_entropy(model(films.inputs[i]), films.labels[i].repeat(films.inputs.shape[1])) for i in mine]
        gradient = torch.autograd.grad(torch.stack(each).mean(), list(model.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradient))
        for t, g in zip(total, gradient, strict=True):
            t += g * min(1.0, bound / max(float(norm), 1e-30))  # a film that is fitted perfectly has none
    return total


def all_in(model, films, privacy, expected=1.0, seed=0, rate=1.0):
    """One step with rate 1, learning rate 1: how the parameters moved."""
    before = [p.detach().clone() for p in model.parameters()]
    training = Training(sample_rate=rate, learning_rate=1.0)
    train(model, films, training, privacy, SecureGenerator.from_seed(seed), expected)
    return [old - p.detach() for old, p in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("unit", ["patient", "film"])
@pytest.mark.parametrize("part_films", [1000, 7])
@pytest.mark.parametrize("name", ["litenet", "ckksnet"])
def test_clipped_sum_equals_plain_torch(name, part_films, unit, monkeypatch):
    torch.manual_seed(0)
    in_shape, views = ((6,), 3) if name == "litenet" else ((1, 28, 28), 1)
    owner = np.sort(np.random.default_rng(0).integers(9, size=20)).astype(str)
    owner = owner[np.random.default_rng(1).permutation(20)]  # a patient's films lie anywhere
    films = Films(torch.randn(20, views, *in_shape), torch.randint(3, (20,)), owner)
    model = build(name, 3, in_shape, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    monkeypatch.setattr("primia_lite.training.PART_FILMS", part_films)
    monkeypatch.setattr("primia_lite.training.CACHE_BYTES", part_films * 3 * 6 * 4)  # of the head
    bound = 0.6
    expected = clipped_sum(model, films, bound, unit)
    moved = all_in(model, films, Privacy(TINY, bound, 8, unit=unit), expected=5.0)
    for got, want in zip(moved, expected, strict=True):
        torch.testing.assert_close(got, want / 5.0, atol=1e-5, rtol=1e-4)


def test_a_patient_with_many_films_counts_as_one_with_one():
    """Ten copies of a film are one gradient, of the length of one film's."""
    film = tabular(n=1, scale=3.0)
    ten = Films(film.inputs.repeat(10, 1, 1), film.labels.repeat(10), np.repeat(["child"], 10))
    one, many = (all_in(build("litenet", 3, (6,)), f, Privacy(TINY, 0.5, 8)) for f in (film, ten))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b)
    by_film = all_in(build("litenet", 3, (6,)), ten, Privacy(TINY, 0.5, 8, unit="film"))
    torch.testing.assert_close(by_film[0], 10 * one[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", [1, 4])
def test_the_heads_closed_form_gives_the_norms_of_autograd(views):
    films = tabular(n=60, d=8, views=views, patients=17, seed=3)
    model = build("litenet", 3, (8,))
    torch.nn.init.normal_(model.weight)
    owned = films.units("patient")
    unit, counts = owned.of_film, owned.count * views
    share = (1.0 / counts).repeat_interleave(counts)
    labels = films.labels[owned.order].repeat_interleave(views)
    rows = PhysicalBatch(
        films.inputs[owned.order].flatten(0, 1), torch.arange(len(counts)), counts,
        share[:, None] * F.one_hot(labels, 3),
    )  # fmt: skip
    total, norms, _ = LinearGhostClipping.of(films, "patient").clipped_sum(model, rows, 0.7)
    for u in range(len(counts)):
        own = F.cross_entropy(
            model(films.inputs[unit == u].flatten(0, 1)), films.labels[unit == u].repeat_interleave(views)
        )
        gradient = torch.autograd.grad(own, list(model.parameters()))
        assert float(norms[u]) == pytest.approx(float(torch.sqrt(sum((g**2).sum() for g in gradient))), rel=1e-5)
    for got, want in zip(total.values(), clipped_sum(model, films, 0.7), strict=True):
        torch.testing.assert_close(got, want.double(), atol=1e-5, rtol=1e-5)
    assert LinearGhostClipping.of(films, "patient") is LinearGhostClipping.of(films, "patient")
    assert LinearGhostClipping.of(films.subset(np.arange(5)), "patient") is not LinearGhostClipping.of(films, "patient")
    before = LinearGhostClipping.of(films, "patient")
    films.inputs[0] *= 2  # films that are changed in place are measured anew
    assert LinearGhostClipping.of(films, "patient") is not before


def test_rows_that_cancel_do_not_make_a_sum_longer_than_the_clip():
    """A hundred films of one patient in pairs of opposite gradients: the norm is nearly 0, the rows are long."""
    x = 20 * torch.randn(50, 1, 1200, generator=torch.Generator().manual_seed(0))
    films = Films(torch.cat([x, -0.99 * x]), torch.zeros(100, dtype=torch.int64), np.repeat(["child"], 100))
    wanted = clipped_sum(build("litenet", 3, (1200,)), films, 1e30)[0].flatten()
    moved = all_in(build("litenet", 3, (1200,)), films, Privacy(TINY, 0.5, 8))[0].flatten()
    assert 0 < moved.norm() < 0.1 * wanted.norm() and wanted.norm() < 0.5 * 2  # clipped by its rows, not by its norm
    assert F.cosine_similarity(moved, wanted, dim=0) > 0.999  # shortened, and not turned


@pytest.mark.parametrize("views", [1, 4])
def test_an_empty_record_moves_a_linear_heads_computed_sum_by_no_more_than_is_counted(views):
    """Zero-out adjacency: a patient's rows count for nothing. All gradients are alike: rounding is at its worst."""
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.rand(1, views, 500, generator=generator), dim=2).repeat(900, 1, 1)
    films = Films(x, torch.zeros(900, dtype=torch.int64), np.repeat(np.arange(300), 3).astype(str))
    model = build("litenet", 3, (500,))
    batch = PoissonBatch(torch.arange(300), 1.0)
    parts = list(private_rows(films, batch, Training(), "patient", None, generator))
    assert sum(len(rows.units) for rows in parts) == 300
    whole, _ = ClippedSum(model, 0.25, "patient", films)(batch, parts)
    for patient in (0, 17, 299):
        emptied = [replace(rows, target=torch.where((rows.units[rows.owner] == patient)[:, None], 0.0, rows.target))
                   for rows in parts]  # fmt: skip
        rest, _ = ClippedSum(model, 0.25, "patient", films)(batch, emptied)
        moved = float((whole["weight"] - rest["weight"]).norm()) / 0.25
        assert 0.999 < moved < 1 + FLOAT32_MARGIN / 100
        # Not sampled, its rows are missing instead, and the others' lie elsewhere.
        left = PoissonBatch(torch.tensor([u for u in range(300) if u != patient]), 1.0)
        away, _ = ClippedSum(model, 0.25, "patient", films)(
            left, private_rows(films, left, Training(), "patient", None, generator)
        )
        assert float((away["weight"] - rest["weight"]).norm()) / 0.25 < FLOAT32_MARGIN / 100


@pytest.mark.parametrize("scale", [1, 10, 100, 1000])
def test_films_that_cancel_do_not_make_a_networks_sum_longer_than_the_clip(scale):
    """Two nearly equal films of a patient with two labels: their gradients cancel but for rounding."""
    longest = 0.0
    for apart in (3e-3, 1e-3, 2e-4, 5e-5):
        torch.manual_seed(0)
        model = build("ckksnet", 3, (1, 28, 28), seed=1)
        with torch.no_grad():
            model[4].weight.mul_(scale)
            model[7].weight.zero_()
            model[7].bias[:] = torch.tensor([0.0, 0.0, -40.0])
        film = torch.randn(1, 1, 28, 28)
        films = Films(
            torch.stack([film, film + apart * torch.randn_like(film)]), torch.tensor([0, 1]), np.array(["c", "c"])
        )
        batch = PoissonBatch(torch.arange(1), 1.0)
        rows = private_rows(films, batch, Training(), "patient", None, torch.Generator())
        total, _ = ClippedSum(model, 0.5, "patient", films)(batch, rows)
        longest = max(longest, math.sqrt(sum(float(value.square().sum()) for value in total.values())) / 0.5)
    assert longest <= 1 + FLOAT32_MARGIN


def test_clipping_alone_is_dp_sgd_less_its_noise():
    films, moved = tabular(n=60, patients=20, scale=3.0), []
    training = Training(sample_rate=0.5, local_steps=4)
    for one, privacy in ((training.changed(max_grad_norm=0.3), None), (training, Privacy(TINY, 0.3, 8))):
        model = build("litenet", 3, (6,))
        train(model, films, one, privacy, SecureGenerator.from_seed(2), 0.5 * len(films.units("patient")))
        moved.append(model.weight.detach())
    torch.testing.assert_close(*moved, atol=1e-6, rtol=1e-5)


def test_the_noise_multiplier_is_said_once():
    privacy = Privacy(1.5, 0.5, 8.0, planned=(0.5, 4), also=(Release(9.0, 1.0, 1),))
    assert privacy.plan == (Release(9.0, 1.0, 1), Release(1.5, 0.5, 4)) and Privacy(1.5, 0.5, 8.0).plan == ()
    assert replace(privacy, noise_multiplier=2.0).plan[1].noise_multiplier == 2.0


@pytest.mark.parametrize("name", ["litenet", "ckksnet"])
def test_a_whole_step_equals_opacus(name):
    """Opacus's own hooks and optimiser, unit film, on the same batch: clipped sum over the expected batch."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    torch.manual_seed(0)
    in_shape = (6,) if name == "litenet" else (1, 28, 28)
    films = Films(torch.randn(20, 1, *in_shape), torch.randint(3, (20,)), np.arange(20).astype(str))
    ours, peer = build(name, 3, in_shape, seed=1), build(name, 3, in_shape, seed=1)
    moved = all_in(ours, films, Privacy(TINY, 0.4, 8, unit="film"), expected=20.0)
    before = [p.detach().clone() for p in peer.parameters()]
    wrapped = GradSampleModule(peer, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(peer.parameters(), 1.0), noise_multiplier=0.0, max_grad_norm=0.4, expected_batch_size=20
    )
    F.cross_entropy(wrapped(films.inputs[:, 0]), films.labels, reduction="sum").backward()
    optimizer.step()
    for got, old, p in zip(moved, before, peer.parameters(), strict=True):
        torch.testing.assert_close(got, old - p.detach(), atol=1e-5, rtol=1e-4)


def noise_of_steps(n_steps, sigma, bound, expected_batch, sample_rate=1e-9):
    moved = []
    for s in range(n_steps):
        privacy = Privacy(sigma, bound, 8)
        step = all_in(build("litenet", 3, (6,)), tabular(), privacy, expected_batch, seed=s, rate=sample_rate)
        moved.append(torch.cat([p.flatten() for p in step]))
    return torch.stack(moved).numpy()


def test_an_empty_batch_is_noise_of_the_stated_scale():
    sigma, bound, expected = 1.3, 0.5, 10.0
    noise = noise_of_steps(400, sigma, bound, expected) / (sigma * bound / expected)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)


def test_noise_is_added_once_however_many_parts(monkeypatch):
    sigma, bound, expected = 1.3, 0.5, 10.0
    monkeypatch.setattr("primia_lite.training.PART_FILMS", 3)
    torch.manual_seed(0)
    films = Films(torch.randn(10, 1, 1, 12, 12), torch.randint(3, (10,)), np.arange(10).astype(str))
    moved = []
    for s in range(200):
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
        torch.nn.init.zeros_(model[1].weight)
        moved.append(all_in(model, films, Privacy(sigma, bound, 8), expected, seed=s)[0].flatten())
    assert abs(torch.stack(moved).std(0).mean() / (sigma * bound / expected) - 1) < 0.03


@pytest.mark.parametrize("unit", ["patient", "film"])
def test_one_unit_moves_the_sum_by_at_most_the_clip(unit):
    films = tabular(scale=100.0, patients=12, views=2)
    for i in range(10):
        alone = films.subset(films.patient_id == films.patient_id[i]) if unit == "patient" else films.subset([i])
        moved = all_in(build("litenet", 3, (6,)), alone, Privacy(TINY, 0.5, 8, unit=unit))
        assert float(torch.sqrt(sum((m**2).sum() for m in moved))) == pytest.approx(0.5, abs=1e-4)


def test_poisson_sampling_rate_and_independence():
    n, q, steps = 50, 0.2, 4000
    taken = np.zeros((steps, n), bool)
    for row, batch in zip(taken, poisson_batches(n, q, steps, SecureGenerator.from_seed(5)), strict=True):
        row[batch.units.numpy()] = True
    assert stats.binomtest(int(taken.sum()), steps * n, q).pvalue > 1e-3
    # Batch sizes are binomial: a shuffled, fixed-size batch would have no variance.
    assert taken.sum(1).var() == pytest.approx(n * q * (1 - q), rel=0.12)
    assert abs(np.corrcoef(taken[:, 0], taken[:, 1])[0, 1]) < 4 / np.sqrt(steps)


def test_patients_are_sampled_whole():
    """A sampled patient brings all films, another one none, and patients come at the rate, not films."""
    films, n = tabular(n=60, patients=15), 0
    films = films.subset(np.random.default_rng(2).permutation(60))  # a patient's films lie anywhere
    owned = films.units("patient")
    for batch in poisson_batches(len(owned), 0.3, 400, SecureGenerator.from_seed(1)):
        for rows in private_rows(films, batch, Training(), "patient", None, torch.Generator()):
            assert torch.equal(rows.count, owned.count[rows.units])
            for unit, inputs in zip(rows.units, rows.inputs.split(rows.count.tolist()), strict=True):
                assert torch.equal(inputs, films.inputs[owned.of_film == unit, 0])
            n += len(rows.units)
    assert stats.binomtest(n, 400 * len(owned), 0.3).pvalue > 1e-3


def test_shuffled_batches_of_fixed_size_are_refused():
    films = tabular()
    model = build("litenet", 3, (6,))
    optimizer, clipped = torch.optim.SGD(model.parameters(), 1.0), ClippedSum(model, 1.0, "patient", films)
    noise = partial(Privacy(1.0, 1.0, 8).add_noise, rng=SecureGenerator())
    batch = next(shuffled_batches(len(films), 0.25, 1, torch.Generator().manual_seed(0)))
    with pytest.raises(UserError, match="Poisson"):
        clipped_step(clipped, optimizer, batch, [], 10.0, noise)
    assert (model.weight == 0).all()
    clipped_step(clipped, optimizer, PoissonBatch(torch.arange(0), 0.25), [], 10.0, noise)
    assert (model.weight != 0).all()


def test_steps_happen_at_every_sampling_outcome():
    # At such a rate most batches are empty; the model moves at each step all the same.
    model = build("litenet", 3, (6,))
    training = Training(sample_rate=0.001, local_steps=5)
    losses = train(model, tabular(), training, Privacy(1.0, 1.0, 8), SecureGenerator.from_seed(1), 1.0)
    assert np.isnan(losses).sum() >= 4
    assert all((p != 0).all() for p in model.parameters())
    plain = train(model, tabular(), training, None, SecureGenerator.from_seed(1), 1.0)  # shuffled, so never empty
    assert not np.isnan(plain).any()


def test_batchnorm_is_refused_by_name_with_the_fix():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UserError, match="GroupNorm"):
        ClippedSum(model, 1.0, "patient")


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"augmentation": ("mixup",)}, "mixup"), ({"class_weights": "balanced"}, "private"),
     ({"max_grad_norm": 0.3}, "max_grad_norm")],
)  # fmt: skip
def test_options_that_contradict_dp_are_refused(changes, word):
    with pytest.raises(UserError, match=word):
        train(build("litenet", 3, (6,)), tabular(), Training(**changes), Privacy(1.0, 1.0, 8), SecureGenerator(), 10.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_its_step_is_refused(bad):
    films = tabular()
    films.inputs[3] = bad
    training = Training(sample_rate=1.0)
    with pytest.raises(TrainingError, match="learning_rate"):
        train(build("litenet", 3, (6,)), films, training, None, SecureGenerator(), 40.0)
    model = build("litenet", 3, (6,))
    with pytest.raises(TrainingError, match="refused"):
        train(model, films, training, Privacy(1.0, 1.0, 8), SecureGenerator(), 40.0)
    assert (model.weight == 0).all()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((0, 1, 8), "noise_multiplier"),
        ((1, 0, 8), "max_grad_norm"),
        ((1, 1, 0), "target_epsilon"),
        ((1, 1, 8, 1e-4, "child"), "unit"),
        ((1, 1, 8, 1e-4, "film", (1.5, 3)), "sample_rate"),
    ],
)
def test_bad_privacy_is_named(values, word):
    with pytest.raises(UserError, match=word):
        Privacy(*values)


@pytest.mark.parametrize("name", ["litenet", "ckksnet"])
def test_smoothing_and_class_weights_are_torchs_own(name):
    in_shape = (6,) if name == "litenet" else (1, 14, 14)
    generator = torch.Generator().manual_seed(0)
    films = Films(
        torch.randn(12, 1, *in_shape, generator=generator), torch.arange(12) % 3, np.arange(12).astype(str)
    )  # fmt: skip
    options = {"label_smoothing": 0.2, "class_weights": (0.5, 1.0, 3.0)}
    model, plain = (build(name, 3, in_shape, seed=1) for _ in range(2))
    training = Training(sample_rate=1.0, learning_rate=1.0, **options)
    train(model, films, training, Privacy(TINY, 1e6, 8), SecureGenerator.from_seed(0), 12.0)
    loss = F.cross_entropy(
        plain(films.inputs[:, 0]), films.labels, torch.tensor(options["class_weights"]), label_smoothing=0.2,
        reduction="none",
    )  # fmt: skip
    gradient = torch.autograd.grad(loss.sum(), list(plain.parameters()))
    for new, old, g in zip(model.parameters(), plain.parameters(), gradient, strict=True):
        torch.testing.assert_close(old.detach() - new.detach(), g / 12, atol=2e-3 * float(g.abs().max()), rtol=1e-3)
