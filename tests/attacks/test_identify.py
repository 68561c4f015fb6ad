"""The identification game: against closed forms, plain simulations of it, and the product's own noisy updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from primia_lite import models
from primia_lite.attacks.identify import (
    Rate,
    clipped_gradients,
    diagnosis_rate,
    gram,
    membership_recall,
    orthogonal_rate,
    rero_bound,
    top1_rate,
)
from primia_lite.attacks.simulate import clipping_alone, initial_state, simulate_view
from primia_lite.config import UserError
from primia_lite.data import load
from primia_lite.data.films import Films
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.accounting.guarantees import tpr_upper_bound
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.training import Training

RECIPE = Training("convnet", sample_rate=1.0, learning_rate=1.0)


@pytest.fixture(scope="module")
def films():
    return models.prepare("convnet", load("phantom", 32, n_films=60)).subset(range(8))


@pytest.fixture(scope="module")
def state(films):
    return initial_state(RECIPE, films)


def random_gradients(n: int, p: int, seed: int = 0) -> torch.Tensor:
    """Of norm at most 1, some clipped and some not, with a common part."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(n, p)) + rng.normal(size=p)
    return torch.from_numpy(g / np.linalg.norm(g, axis=1, keepdims=True) * rng.uniform(0.5, 1.0, (n, 1)))


def agree(hits: int, n: int, rate) -> bool:
    """Whether hits of n may have the same probability as a Rate of independent trials (4 standard errors)."""
    both = (hits + rate.rate * rate.n) / (n + rate.n)
    return abs(hits / n - rate.rate) <= 4 * np.sqrt(both * (1 - both) * (1 / n + 1 / rate.n)) + 1e-12


def played(g: np.ndarray, sigma: float, steps: int, q: float, trials: int, seed: int) -> int:
    """The game with noise of full length, and the likelihood as Gaussian densities: hits."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(len(g), size=trials)
    score = np.zeros((trials, len(g)))
    for _ in range(steps):
        u = sigma * rng.normal(size=(trials, g.shape[1])) + (rng.random(trials) < q)[:, None] * g[truth]
        absent = np.exp(-(u**2).sum(1) / (2 * sigma**2))[:, None]
        present = np.exp(-((u[:, None] - g) ** 2).sum(2) / (2 * sigma**2))  # [trials, N]
        score += np.log((1 - q) * absent + q * present)
    return int((score.argmax(1) == truth).sum())


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["convnet", "ckksnet", "linear"])
@pytest.mark.parametrize("bound", [30.0, 1.0, 1e-2])
def test_clipped_gradients_are_the_products_own(model, bound, films, state):
    recipe = RECIPE.changed(model=model if model != "linear" else "scatternet")
    if model == "linear":  # the closed form of a head's step
        films = Films(torch.randn(8, 2, 5), films.labels, films.patient_id)
    state = initial_state(recipe, films)
    g = clipped_gradients(state, films, recipe, bound)
    constants = sum(v.numel() for name, v in state.items() if name.endswith((".mean", ".scale")))  # of norms
    assert g.dtype == torch.float32 and g.shape == (8, sum(v.numel() for v in state.values()) - constants)
    assert (g.norm(dim=1) <= 1 + 1e-5).all() and (g.norm(dim=1) < 0.9).all() == (bound == 30)
    recipe = recipe.changed(learning_rate=1 / (bound * float(g.norm(dim=1).mean())))  # an update of norm 1: no rounding
    for i in (0, 5):
        view = simulate_view(films.subset([i]), recipe, state, privacy=clipping_alone(bound), seed=1)
        own = torch.cat([v.flatten() for v in view.gradient()]) / bound
        assert (g[i] - own).norm() <= 2e-5 * own.norm()


def test_gram_is_the_matrix_of_inner_products():
    g = random_gradients(5, (1 << 15) + 23).float()  # more columns than one part holds
    assert gram(g).dtype == torch.float64
    torch.testing.assert_close(gram(g), g.double() @ g.double().T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram(g.numpy()), gram(g))


# --- which film -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "sigma", "steps"), [(2, 0.7, 1), (50, 0.4, 1), (50, 1.2, 9), (300, 0.25, 1)])
def test_orthogonal_gradients_have_a_closed_form(n, sigma, steps):
    rate = top1_rate(torch.eye(n), sigma, steps=steps, trials=4000, seed=n)
    exact = orthogonal_rate(sigma, n, steps)
    assert agree(round(exact * 10**6), 10**6, rate)
    assert rate.low <= rate.rate <= rate.high and rate.n == 4000
    assert exact <= rero_bound(sigma, n, steps=steps)


def test_orthogonal_rate_of_two_and_at_the_ends():
    for sigma in (0.3, 1.0, 5.0):  # two: a test between means that lie sqrt(2) apart
        assert orthogonal_rate(sigma, 2) == pytest.approx(norm.cdf(1 / (np.sqrt(2) * sigma)), abs=1e-12)
    assert orthogonal_rate(1.0, 1) == pytest.approx(1.0, abs=1e-12)
    assert orthogonal_rate(1e6, 624) == pytest.approx(1 / 624, rel=1e-4)
    assert orthogonal_rate(1e-3, 624) == pytest.approx(orthogonal_rate(0.0, 624), abs=1e-11)


@pytest.mark.parametrize(("sigma", "steps", "q"), [(0.5, 1, 1.0), (1.0, 4, 1.0), (0.3, 12, 0.3), (0.3, 1, 0.7)])
def test_game_is_that_with_noise_of_full_length(sigma, steps, q):
    g = random_gradients(6, 9, seed=3)
    rate = top1_rate(gram(g), sigma, steps=steps, sample_rate=q, trials=40_000, seed=1)
    assert agree(played(g.numpy(), sigma, steps, q, 40_000, seed=2), 40_000, rate)
    assert 0.25 < rate.rate < 0.97  # else nothing was compared


def test_game_of_two_close_candidates_in_little_noise():
    g = np.array([[1.0, 0.0], [np.cos(0.1), np.sin(0.1)]])  # likelihood ratios of e^200 over nobody
    rate = top1_rate(gram(g), 0.05, sample_rate=0.9, steps=2, trials=20_000)
    assert agree(played(g, 0.05, 2, 0.9, 20_000, seed=2), 20_000, rate)
    assert 0.8 < rate.rate < 0.97


@pytest.mark.parametrize(("sigma", "steps", "q"), [(0.3, 1, 1.0), (1.0, 10, 1.0), (0.5, 1, 0.5), (0.6, 30, 0.1)])
def test_no_rate_is_above_the_bound_and_a_wrong_bound_would_show(sigma, steps, q):
    """Orthogonal gradients of norm 1 are near the worst: they come so close that 15 % more noise in the bound fails."""
    rate = top1_rate(torch.eye(40), sigma, steps=steps, sample_rate=q, trials=50_000)
    assert rate.high < rero_bound(sigma, 40, steps=steps, sample_rate=q)
    assert rate.low > rero_bound(1.15 * sigma, 40, steps=steps, sample_rate=q)


@pytest.mark.parametrize(("sigma", "steps"), [(0.3, 1), (0.5, 1), (1.0, 1), (3.0, 1), (2.0, 16)])
@pytest.mark.parametrize("n", [3, 624])
def test_bound_in_closed_form_and_by_privacy_loss(sigma, steps, n):
    closed = rero_bound(sigma, n, steps=steps)
    by_loss = float(tpr_upper_bound(Release(sigma, 1.0, steps), [1 / n])[0])
    assert closed - 1e-9 <= by_loss <= closed * 1.01 + 1e-4


def test_subsampled_bound_is_above_the_best_test():
    sigma, steps, q, n, m = 0.6, 30, 0.1, 50, 100_000
    rng = np.random.default_rng(0)

    def ratios(present):
        u = sigma * rng.normal(size=(m, steps)) + present * (rng.random((m, steps)) < q)
        return np.log1p(q * np.expm1((2 * u - 1) / (2 * sigma**2))).sum(1)

    best = (ratios(1) > np.quantile(ratios(0), 1 - 1 / n)).mean()  # adding: true positives at 1/N false ones
    bound = rero_bound(sigma, n, steps=steps, sample_rate=q)
    assert best - 0.01 <= bound <= 1.5 * best
    assert bound < rero_bound(sigma, n, steps=steps)
    assert rero_bound(sigma, n, steps=1, sample_rate=1 - 1e-9) == pytest.approx(rero_bound(sigma, n), rel=0.01)


def test_real_noisy_updates_are_identified_as_often(films):
    bound, sigma, trials, recipe = 1.0, 0.4, 500, RECIPE.changed(model="litenet")
    films = Films(torch.randn(8, 1, 30, generator=torch.Generator().manual_seed(0)), films.labels, films.patient_id)
    state = initial_state(recipe, films)
    g = clipped_gradients(state, films, recipe, bound)
    half, hits = g.square().sum(1) / 2, 0
    for trial in range(trials):
        own, privacy = films.subset([trial % 8]), Privacy(sigma, bound, 1e30, unit="film")
        view = simulate_view(own, recipe, state, privacy=privacy, seed=trial)
        u = torch.cat([v.flatten() for v in view.gradient()]) / bound
        hits += int((g @ u - half).argmax()) == trial % 8
    rate = top1_rate(gram(g), sigma, trials=20_000)
    assert 0.3 < rate.rate < 0.9
    assert agree(hits, trials, rate)


def test_twins_count_a_share():
    twins = torch.eye(6)[[0, 0, 0, 1, 2, 2]]
    assert agree(500_000, 10**6, top1_rate(gram(twins), 0.0, trials=6000))  # three groups of six
    assert agree(500_000, 10**6, top1_rate(gram(twins), 0.01, sample_rate=0.9, steps=9, trials=6000))
    assert agree(250_000, 10**6, top1_rate(torch.ones(4, 4), 0.3, trials=4000))
    assert agree(250_000, 10**6, top1_rate(torch.zeros(4, 4), 0.3, trials=4000))
    assert top1_rate(torch.eye(4), 0.0, trials=200).rate == 1.0


def test_rate_has_an_exact_interval_and_a_seed():
    matrix = gram(random_gradients(5, 9))
    rate = top1_rate(matrix, 0.5, trials=300, seed=4)
    assert rate == top1_rate(matrix, 0.5, trials=300, seed=4) != top1_rate(matrix, 0.5, trials=300, seed=5)
    interval = binomtest(round(rate.rate * 300), 300).proportion_ci(0.95, "exact")
    assert (rate.low, rate.high) == (interval.low, interval.high)
    assert str(Rate.of(3, 4)) == "75.0% (19.4% to 99.4%, n = 4)"


# --- which diagnosis, and who is in a sum -----------------------------------------------------------------------------


def clusters(n: int, seed: int = 0):
    """Gradients near one of three orthogonal centres, and their classes, unequally many."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=(0.6, 0.3, 0.1))
    g = np.eye(20)[labels] + 0.1 * rng.normal(size=(n, 20))
    return g / np.linalg.norm(g, axis=1, keepdims=True), labels


def test_diagnosis_is_near_certain_without_noise_and_chance_in_much():
    g, labels = clusters(400)
    known, known_labels = clusters(300, seed=1)
    assert diagnosis_rate(g, labels, known, known_labels, 0.05).rate > 0.97
    chance = diagnosis_rate(g, labels, known, known_labels, 1e4)
    assert chance.low <= 1 / 3 <= chance.high and chance.n == 400
    for sigma in (0.0, 1e-3):  # the film itself in the gallery, its class no cluster
        mixed = np.random.default_rng(2).integers(3, size=400)
        assert diagnosis_rate(g, mixed, g, mixed, sigma).rate == 1.0


def test_diagnosis_of_class_centres_has_a_closed_form_and_stays_below_its_bound():
    labels = np.random.default_rng(0).choice(3, 6000, p=(0.2, 0.2, 0.6))
    for sigma, steps in ((0.6, 1), (1.5, 4)):
        rate = diagnosis_rate(np.eye(3)[labels], labels, np.eye(3)[[0, 1, 2, 2]], [0, 1, 2, 2], sigma, steps=steps)
        exact = orthogonal_rate(sigma, 3, steps)
        assert abs(rate.rate - exact) < 4 * (rate.high - rate.low) / 3.92
        assert rate.low < rate.rate < rate.high <= rero_bound(sigma, 3, steps=steps) + 0.05
    assert rero_bound(0.5, 3) == pytest.approx(norm.cdf(norm.ppf(1 / 3) + 2))


def test_diagnosis_weighs_classes_alike_whatever_their_number_and_length():
    centres, known_labels = np.diag([1.0, 0.6, 0.3]), np.repeat([0, 1, 2], [30, 1, 1])
    labels, sigma, rng = np.repeat([0, 1, 2], 3000), 0.7, np.random.default_rng(0)
    u = centres[labels] + sigma * rng.normal(size=(9000, 3))
    right = ((u[:, None] - centres) ** 2).sum(2).argmin(1) == labels
    expected = np.mean([right[labels == c].mean() for c in range(3)])
    rate = diagnosis_rate(centres[labels], labels, centres[known_labels], known_labels, sigma)
    assert abs(rate.rate - expected) < 4 * np.sqrt(2) * (rate.high - rate.low) / 3.92


def test_members_of_a_sum_are_found_without_noise_and_guessed_in_much():
    matrix = gram(random_gradients(40, 80))
    clear = membership_recall(matrix, 0.0, 10)
    assert clear.rate == clear.high == 1.0 and clear.low > 0.9
    chance = membership_recall(matrix, 1e4, 10, trials=200)
    assert chance.low <= 0.25 <= chance.high and chance.n == 200
    assert chance.rate < membership_recall(matrix, 0.1, 10, trials=200).rate < 1


def test_membership_is_the_best_linear_estimate_in_full_length():
    rng, n, size, sigma, trials = np.random.default_rng(0), 12, 2, 0.15, 40_000
    g = 0.9 * np.eye(15)[0] + rng.normal(size=(n, 15)) * np.geomspace(0.3, 0.03, 15)  # much in common, few directions
    covariance = size / n * (1 - size / n) * n / (n - 1) * (np.eye(n) - 1 / n)
    gain = covariance @ g @ np.linalg.inv(g.T @ covariance @ g + sigma**2 * np.eye(15))
    member = rng.random((trials, n)).argsort(1) < size
    u = member @ g + sigma * rng.normal(size=(trials, 15))
    named = ((u - size * g.mean(0)) @ gain.T).argsort(1)[:, -size:]
    found = np.take_along_axis(member, named, 1).mean()
    rate = membership_recall(gram(g), sigma, size, trials=trials)
    assert abs(found - rate.rate) < 4 * np.sqrt(2) * (rate.high - rate.low) / 3.92
    assert size / n + 0.1 < rate.rate < 0.95


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_played_is_refused(films, state):
    for recipe, words in (
        (RECIPE.changed(sample_rate=0.5), "step"),
        (RECIPE.changed(local_steps=2), "step"),
        (RECIPE.changed(augmentation=("flip",)), "augmentation"),
        (RECIPE.changed(class_weights="balanced"), "public"),
    ):
        with pytest.raises(UserError, match=words):
            clipped_gradients(state, films, recipe, 1.0)
    with pytest.raises(UserError, match="max_grad_norm"):
        clipped_gradients(state, films, RECIPE, 0.0)
    with pytest.raises(UserError, match="finite"):
        clipped_gradients({name: v * torch.nan for name, v in state.items()}, films, RECIPE, 1.0)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: gram(torch.ones(3)), "row"),
        (lambda: top1_rate(torch.ones(2, 3), 1.0), "Gram"),
        (lambda: top1_rate(torch.eye(2) * torch.nan, 1.0), "Gram"),
        (lambda: top1_rate(torch.eye(2), -1.0), "sigma"),
        (lambda: top1_rate(torch.eye(2), 0.0, sample_rate=0.5), "sample_rate"),
        (lambda: top1_rate(torch.eye(2), 1.0, sample_rate=1.5), "sample_rate"),
        (lambda: top1_rate(torch.eye(2), 1.0, steps=0), "least"),
        (lambda: rero_bound(1.0, 0), "least"),
        (lambda: orthogonal_rate(float("inf"), 3), "finite"),
        (lambda: membership_recall(torch.eye(3), 1.0, 3), "batch_size"),
        (lambda: diagnosis_rate(torch.eye(2), [0, 1], torch.eye(2), [0, 0], 1.0), "class"),
        (lambda: diagnosis_rate(torch.eye(2), [0], torch.eye(2), [0, 0], 1.0), "labels"),
    ],
)
def test_bad_numbers_are_refused(call, word):
    with pytest.raises(UserError, match=word):
        call()
