"""DP-SGD: what is clipped, how much noise, who is sampled."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from primia_lite.config import TrainingError, UserError
from primia_lite.models import Films, build
from primia_lite.privacy.dpsgd import Privacy, PrivateStep, check_model
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import Training, poisson_batches, shuffled_batches, train


def tabular(n=40, d=6, classes=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    inputs = scale * torch.randn(n, 1, d, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return Films(inputs, labels, np.arange(n).astype(str))


def losses_of(films):
    return lambda model, part: F.cross_entropy(model(films.inputs[part, 0]), films.labels[part], reduction="none")[None]


def clipped_sum(model, films, index, bound):
    """The clipped sum by one backward pass per film: plain torch, nothing shared with the product."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in index:
        loss = F.cross_entropy(model(films.inputs[i, 0][None]), films.labels[i][None])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradient))
        for t, g in zip(total, gradient, strict=True):
            t += g * min(1.0, bound / float(norm))
    return total


@pytest.mark.parametrize("part_size", [1000, 7])
@pytest.mark.parametrize("name", ["litenet", "ckksnet"])
def test_clipped_sum_equals_plain_torch(name, part_size):
    torch.manual_seed(0)
    in_shape = (6,) if name == "litenet" else (1, 28, 28)
    films = Films(torch.randn(20, 1, *in_shape), torch.randint(3, (20,)), np.arange(20).astype(str))
    model = build(name, 3, in_shape, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    expected = clipped_sum(model, films, range(20), 0.8)
    tiny = 1e-9  # noise too small to matter
    step = PrivateStep(
        model, torch.optim.SGD(model.parameters(), 1.0), Privacy(tiny, 0.8, 8), 5.0, SecureGenerator.from_seed(0)
    )
    step.part_size = part_size
    step(losses_of(films), torch.arange(20))
    for p, old, want in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(old - p.detach(), want / 5.0, atol=1e-5, rtol=1e-4)


def test_views_are_averaged_before_clipping():
    torch.manual_seed(0)
    films = Films(torch.randn(9, 4, 6), torch.randint(3, (9,)), np.arange(9).astype(str))
    model = build("litenet", 3, (6,))
    want = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(9):
        loss = F.cross_entropy(model(films.inputs[i]), films.labels[i].repeat(4))
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradient))
        for w, g in zip(want, gradient, strict=True):
            w += g * min(1.0, 0.3 / float(norm))
    training = Training(sample_rate=1.0, learning_rate=1.0, augmentation=("jitter",))
    train(model, films, training, Privacy(1e-9, 0.3, 8), SecureGenerator.from_seed(0), 9.0)
    for p, w in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(-p.detach(), w / 9.0, atol=1e-5, rtol=1e-4)


def noise_of_steps(n_steps, sigma, bound, expected_batch, index):
    films = tabular()
    moved = []
    for s in range(n_steps):
        model = build("litenet", 3, (6,))
        step = PrivateStep(
            model, torch.optim.SGD(model.parameters(), 1.0), Privacy(sigma, bound, 8), expected_batch,
            SecureGenerator.from_seed(s),
        )  # fmt: skip
        step(losses_of(films), index)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(moved).numpy()


def test_an_empty_batch_is_noise_of_the_stated_scale():
    sigma, bound, expected = 1.3, 0.5, 10.0
    noise = noise_of_steps(400, sigma, bound, expected, torch.arange(0)) / (sigma * bound / expected)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)


def test_noise_is_added_once_however_many_parts(monkeypatch):
    sigma, bound, expected = 1.3, 0.5, 10.0
    monkeypatch.setattr("primia_lite.privacy.dpsgd._GRADIENT_BYTES", 4 * 21 * 3)  # parts of three films
    index = torch.arange(10)
    moved = noise_of_steps(400, sigma, bound, expected, index)
    assert abs(moved.std(0).mean() / (sigma * bound / expected) - 1) < 0.03


def test_one_film_moves_the_sum_by_at_most_the_clip():
    films = tabular(scale=100.0)
    model = build("litenet", 3, (6,))
    for i in range(10):
        moved = clipped_sum(model, films, [i], 0.5)
        assert torch.sqrt(sum((m**2).sum() for m in moved)) <= 0.5 + 1e-6
    privacy = Privacy(1e-9, 0.5, 8)
    step = PrivateStep(model, torch.optim.SGD(model.parameters(), 1.0), privacy, 1.0, SecureGenerator.from_seed(0))
    step(losses_of(films), torch.tensor([3]))
    assert float(torch.sqrt(sum((p.detach() ** 2).sum() for p in model.parameters()))) == pytest.approx(0.5, abs=1e-4)


def test_poisson_sampling_rate_and_independence():
    n, q, steps = 50, 0.2, 4000
    taken = np.zeros((steps, n), bool)
    for row, batch in zip(taken, poisson_batches(n, q, steps, SecureGenerator.from_seed(5)), strict=True):
        row[batch.numpy()] = True
    assert stats.binomtest(int(taken.sum()), steps * n, q).pvalue > 1e-3
    # Batch sizes are binomial: a shuffled, fixed-size batch would have no variance.
    assert taken.sum(1).var() == pytest.approx(n * q * (1 - q), rel=0.12)
    assert abs(np.corrcoef(taken[:, 0], taken[:, 1])[0, 1]) < 4 / np.sqrt(steps)


def test_private_training_samples_by_poisson_and_plain_training_by_shuffling(monkeypatch):
    used = []
    for kind, function in (("poisson", poisson_batches), ("shuffled", shuffled_batches)):
        monkeypatch.setattr(
            f"primia_lite.training.{function.__name__}",
            lambda *args, kind=kind, function=function: used.append(kind) or function(*args),
        )
    training = Training(sample_rate=0.5, local_steps=2)
    for privacy in (Privacy(1.0, 1.0, 8), None):
        train(build("litenet", 3, (6,)), tabular(), training, privacy, SecureGenerator.from_seed(0), 20.0)
    assert used == ["poisson", "shuffled"]


def test_shuffled_batches_cover_all_films_each_pass():
    batches = list(shuffled_batches(10, 0.25, 10, torch.Generator().manual_seed(0)))
    assert {len(b) for b in batches} == {2}
    assert sorted(torch.cat(batches[:5]).tolist()) == list(range(10))


def test_steps_happen_at_every_sampling_outcome():
    # At such a rate most batches are empty; the model moves at each step all the same.
    model = build("litenet", 3, (6,))
    training = Training(sample_rate=0.001, local_steps=5)
    losses = train(model, tabular(), training, Privacy(1.0, 1.0, 8), SecureGenerator.from_seed(1), 1.0)
    assert np.isnan(losses).sum() >= 4
    assert all((p != 0).all() for p in model.parameters())


def test_batchnorm_is_refused_by_name_with_the_fix():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UserError, match="layer '1' is BatchNorm2d.*GroupNorm"):
        check_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": ("mixup",)}, "mixup blends films"),
        ({"class_weights": "balanced"}, "counts private labels"),
    ],
)
def test_options_that_contradict_dp_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        train(build("litenet", 3, (6,)), tabular(), Training(**changes), Privacy(1.0, 1.0, 8), SecureGenerator(), 10.0)


def test_a_loss_that_is_not_finite_is_named():
    films = tabular()
    films.inputs[3] = float("nan")
    for privacy in (None, Privacy(1.0, 1.0, 8)):
        with pytest.raises(TrainingError, match="the loss is nan at local step 1 of 1: lower learning_rate"):
            train(build("litenet", 3, (6,)), films, Training(sample_rate=1.0), privacy, SecureGenerator(), 40.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1, 8), "noise_multiplier is 0"),
        ((1, 0, 8), "max_grad_norm is 0"),
        ((1, 1, 8, 1e-4, "child"), "unit is 'child'"),
    ],
)
def test_bad_privacy_is_named(values, message):
    with pytest.raises(UserError, match=message):
        Privacy(*values)
