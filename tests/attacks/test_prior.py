"""An attacker who knows how films look: the prior, the likelihood of noisy updates, features and class images."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from attack_cases import GUESSING, PIXELS, RECIPE, ROUNDS, SIDE, SUM, TANH, film_gradients, flat, seen
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from primia_lite import metrics, models
from primia_lite.attacks import (
    AttackerView,
    FeatureInversion,
    FilmPrior,
    MapEstimator,
    class_image,
    clipping_alone,
    head_features,
    initial_state,
    reconstruct,
    simulate_view,
)
from primia_lite.attacks.prior import noisy_misfit
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.training import Training


def test_the_prior_is_the_films_covariance(public, prior):
    assert prior.mean.shape == (SIDE, SIDE) and prior.components.shape == (PIXELS, 48)
    torch.testing.assert_close(prior.components.T @ prior.components, torch.eye(48), rtol=0, atol=1e-4)
    pixels = public.reshape(len(public), -1) / 255.0
    np.testing.assert_allclose(prior.mean.flatten(), pixels.mean(0), atol=1e-6)
    covariance = np.cov(pixels.T, bias=True)
    fitted = ((prior.components * prior.spread**2) @ prior.components.T).numpy()
    assert np.linalg.norm(fitted - covariance) < 0.05 * np.linalg.norm(covariance)
    exact = np.linalg.eigvalsh(covariance)[::-1][:10]
    np.testing.assert_allclose(prior.spread[:10].numpy() ** 2, exact, rtol=0.02)
    assert prior.spread.tolist() == sorted(prior.spread.tolist(), reverse=True)


def test_a_prior_repeats_and_needs_more_films_than_components(public):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two = FilmPrior.fit(public[:30], 8), FilmPrior.fit(public[:30], 8)
    assert torch.equal(one.components, two.components) and torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(UserError, match="components"):
        FilmPrior.fit(public[:8], 8)


def test_a_prior_of_another_size_and_private_local_steps_of_unknown_likelihood_are_refused(public, films, prior):
    with pytest.raises(UserError, match="size"):
        reconstruct(seen(films, [0]), MapEstimator(FilmPrior.fit(public[:20, :30, :30], 4)))
    view = seen(films, [0], privacy=Privacy(0.5, 1.0, 1e9, unit="film"), local_steps=4)
    with pytest.raises(UserError, match="private"):
        reconstruct(view, MapEstimator(prior))


def test_a_prior_beats_the_mean_film_under_little_noise_alone(films, prior, gallery):
    gains = []
    for sigma in (0.01, 5.0):
        view = seen(films, [0], GUESSING, Privacy(sigma, 1.0, 1e9, unit="film"))
        out = reconstruct(view, MapEstimator(prior, 80))
        (score,) = gallery.score(out.images.numpy(), [0])
        gains.append(score["psnr_gain"])
        assert out.history and not out.stopped and out.iterations == 80
    assert gains[0] > 4 and score["identified"] == 0
    assert metrics.psnr(out.images, prior.mean) > 35  # 5.0: nothing but the prior is left


def test_a_prior_inverts_without_noise_and_a_batch(films, prior, gallery):
    for index in ([0], [0, 1]):
        view = seen(films, index, model_options={**TANH, "hidden": 64})
        scores = gallery.score(reconstruct(view, MapEstimator(prior, 80)).images.numpy(), index)
        assert np.mean([row["psnr_gain"] for row in scores]) > 2


def test_the_noise_of_a_sum_weighs_as_much_as_it_is(films, prior):
    """At the true films the misfit of n coordinates is n / 2, however many hospitals add noise."""
    for n in (1, 3):
        places = [films.subset([k]) for k in range(n)]
        state = initial_state(RECIPE, films)
        view = simulate_view(places, RECIPE, state, SUM, Privacy(1.0, 1.0, 100.0, unit="film"), seed=0)
        value = noisy_misfit(view, view.model(), films.inputs[:n, 0], view.labels, view.gradient())
        count = len(flat(view.gradient()))
        assert abs(2 * float(value.detach()) / count - 1) < 4 * math.sqrt(2 / count)


def test_the_likelihood_of_rounds_is_a_gaussian_density(films, prior):
    """Of three rounds with weights of their own, against densities of independently clipped gradients."""
    own, sigma, bound, n = films.subset([0, 1]), 0.7, 0.8, 2
    states = [initial_state(RECIPE, own, seed) for seed in range(3)]
    view = simulate_view(own, RECIPE, states, ROUNDS, Privacy(sigma, bound, 1e9, unit="film"), seed=0)

    def density(candidates) -> float:
        total = 0.0
        for t, state in enumerate(states):
            each = film_gradients(candidates, RECIPE, state).double().numpy()
            each = each * np.minimum(1, bound / np.linalg.norm(each, axis=1, keepdims=True))
            seen_t = flat(view.gradient(t)).double().numpy()
            total += norm.logpdf(seen_t, each.sum(0) / n, sigma * bound / n).sum()
        return total

    def likelihood(candidates) -> float:
        parts = (
            noisy_misfit(view, view.model(t), candidates.inputs[:, 0], view.labels, view.gradient(t)) for t in range(3)
        )
        return float(sum(part.detach().double() for part in parts))

    other = replace(films.subset([7, 9]), labels=own.labels)
    assert density(own) > density(other)
    gap = density(own) - density(other)
    assert likelihood(other) - likelihood(own) == pytest.approx(gap, rel=0.01, abs=0.1)
    # And the estimator adds them up: its first step of one film is at the prior's mean, where the prior pulls nowhere.
    one = replace(view, labels=view.labels[:1], n_films=1, denominator=1.0)
    mean = replace(films.subset([0]), inputs=films.normalise(prior.mean)[None, None, None])
    parts = (noisy_misfit(one, one.model(t), mean.inputs[:, 0], one.labels, one.gradient(t)) for t in range(3))
    assert reconstruct(one, MapEstimator(prior, 1)).loss == pytest.approx(
        float(sum(p.detach() for p in parts)), rel=1e-4
    )


def test_rounds_add_up(films, prior, gallery):
    state, privacy = initial_state(RECIPE, films), Privacy(0.3, 1.0, 1e9, unit="film")
    gain = []
    for n in (1, 4):
        view = simulate_view(films.subset([0]), RECIPE, [state] * n, ROUNDS, privacy, seed=0)
        out = reconstruct(view, MapEstimator(prior, 30))
        gain.append(gallery.score(out.images.numpy(), [0])[0]["pncc"])
    assert gain[1] > gain[0] + 0.1


@pytest.mark.parametrize("privacy", [None, clipping_alone(0.5)], ids=["plain", "clipped"])
def test_a_linear_heads_update_holds_the_features(privacy):
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([F.normalize(torch.randn(1, 40, generator=generator)), torch.full((1, 1), 0.1)], 1)
    own = Films(features[:, None], torch.tensor([1]), np.array(["a"]), model="scatternet")
    recipe = Training("scatternet", sample_rate=1.0)
    view = simulate_view(own, recipe, initial_state(recipe, own), privacy=privacy)
    torch.testing.assert_close(head_features(view, 0.1), features[0], rtol=1e-5, atol=1e-6)


def view_of_features(features: torch.Tensor) -> AttackerView:
    """The update of a linear head on one film with these features."""
    derivative = torch.tensor([-0.6, 0.4, 0.2])
    head = nn.Linear(len(features), 3, bias=False)
    return AttackerView.from_gradient(head, [derivative[:, None] * features], (len(features),))


def test_features_that_dont_fit_are_refused(prior):
    with pytest.raises(UserError, match="constant"):
        head_features(view_of_features(torch.tensor([1.0, 2.0, 0.0])), 0.1)
    with pytest.raises(UserError, match="features"):
        reconstruct(view_of_features(torch.ones(7)), FeatureInversion(lambda x: x.flatten(1), prior, 1.0))


@pytest.mark.parametrize("free_pixels", [False, True])
def test_features_are_inverted(free_pixels, films, chest, prior, gallery):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.Softplus(), nn.Flatten()).requires_grad_(False)

    def extract(images):  # grey values, as an extractor of the package takes them
        assert images.dim() == 3
        return F.pad(network(images[:, None] / 127.5 - 1), (0, 1), value=0.1)

    view = view_of_features(extract(torch.from_numpy(chest.images[:1]).float())[0])
    out = reconstruct(view, FeatureInversion(extract, prior, 0.1, 60, free_pixels))
    losses = [value for _, value, _ in out.history]
    assert out.loss < 0.3 * losses[0] and out.loss <= min(losses) + 1e-7
    (score,) = gallery.score(out.images.numpy(), [0])
    assert score["psnr_gain"] > 2 and out.labels.tolist() == [-1] and out.iterations == 60


def test_a_class_image_is_what_the_model_takes_for_that_class(films, prior):
    network = models.build("convnet", 3, (1, SIDE, SIDE))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for label in range(3):
        out = class_image(network, label, prior, films.normalise, iterations=40)
        with torch.no_grad():
            mean, found = (
                network(films.normalise(x)).softmax(1)[0, label] for x in (prior.mean[None, None], out.images)
            )
        assert found > mean + 0.02 and out.labels.tolist() == [label]
        assert out.loss < out.history[0][1] and 0 <= out.images.min() <= out.images.max() <= 1
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for label in (-1, 3):
        with pytest.raises(UserError, match="label"):
            class_image(network, label, prior, films.normalise)
