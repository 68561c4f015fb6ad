"""The linear estimate against noise: beside scikit-learn and scipy, and on the product's own noisy updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge

from primia_lite import models
from primia_lite.attacks import (
    LinearEstimator,
    ThreatModel,
    clipped_gradients,
    initial_state,
    pca_weights,
    reconstruct,
    simulate_view,
)
from primia_lite.config import UserError
from primia_lite.data import load
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.training import Training

SKETCH = Training("mlp", sample_rate=1.0, learning_rate=1.0, model_options={"hidden": 8})
TOLD = ThreatModel("labels told", knows_labels=True)


@pytest.fixture(scope="module")
def films():
    return load("phantom", 32, n_films=300)


@pytest.fixture(scope="module")
def own(films):
    return films.of_split("train")


@pytest.fixture(scope="module")
def inputs(films):
    return models.prepare("mlp", films.of_split("test"))


@pytest.fixture(scope="module")
def sketch(own, inputs):
    return pca_weights(initial_state(SKETCH, inputs), own.images, inputs.normalisation)


@pytest.fixture(scope="module")
def gradients(sketch, own):
    return clipped_gradients(sketch, models.prepare("mlp", own), SKETCH, 2.0)


@pytest.fixture(scope="module")
def estimate(gradients, own):
    return LinearEstimator(gradients, own.images, own.labels)


def look(inputs, state, index, sigma, threat=TOLD, seed=0):
    privacy = Privacy(sigma, 2.0, 1e9, unit="film")
    return simulate_view(inputs.subset([index]), SKETCH, state, threat, privacy, seed=seed)


def update_of(view):
    return torch.cat([g.flatten() for g in view.gradient()]).double().numpy() * view.denominator / view.max_grad_norm


def test_estimate_is_ridge_regression(inputs, sketch, own, gradients, estimate):
    view = look(inputs, sketch, 0, 0.5)
    out = reconstruct(view, estimate)
    mine = own.labels == int(view.labels)
    flat = own.images[mine].reshape(mine.sum(), -1) / 255.0
    ridge = Ridge(alpha=mine.sum() * 0.5**2, solver="svd").fit(gradients[torch.from_numpy(mine)].double().numpy(), flat)
    peer = ridge.predict(update_of(view)[None]).reshape(32, 32)
    np.testing.assert_allclose(out.images[0, 0].numpy(), peer.clip(0, 1), atol=2e-5)


def test_labels_are_weighed_by_their_densities(inputs, sketch, own, gradients):
    """The mixture's density of the update, beside scipy's, in eight directions of it; the rest adds a constant."""
    view = look(inputs, sketch, 0, 0.5, ThreatModel())
    rng = np.random.default_rng(0)
    pixels, g = np.zeros((40, 32, 32), np.uint8), np.zeros((40, gradients.shape[1]))
    labels = np.repeat([0, 1], [25, 15])
    g[:, :8] = rng.normal(size=(40, 8)) * (1 + labels[:, None]) / 10 + update_of(view)[:8]
    pixels[labels == 1] = 255
    out = reconstruct(view, LinearEstimator(torch.tensor(g), pixels, labels))
    u = update_of(view)[:8]
    parts = [g[labels == k, :8] for k in (0, 1)]
    density = [multivariate_normal(p.mean(0), np.cov(p.T, bias=True) + 0.25 * np.eye(8)).pdf(u) for p in parts]
    share = density[1] / sum(density)
    assert 0.02 < share < 0.98
    np.testing.assert_allclose(out.images.mean(), share, atol=1e-5)


def test_labels_are_found_where_noise_is_low(inputs, sketch, estimate):
    for index in range(4):
        out = reconstruct(look(inputs, sketch, index, 0.05, ThreatModel()), estimate)
        assert int(out.labels) == int(inputs.labels[index])


def test_a_sketch_beats_the_labels_mean_film_at_epsilon_8_and_much_noise_hides_it(films, inputs, sketch, own, estimate):
    test, mean = films.of_split("test"), own.images.mean(0) / 255.0

    def gains(sigma):
        out = []
        for index in range(len(test)):
            truth = test.images[index] / 255.0
            got = reconstruct(look(inputs, sketch, index, sigma, seed=index), estimate)
            out.append(10 * np.log10(((mean - truth) ** 2).mean() / ((got.images[0, 0].numpy() - truth) ** 2).mean()))
        return np.array(out)

    clear, drowned = gains(0.54), gains(1e4)
    error = (clear - drowned).std() / len(test) ** 0.5
    assert (clear - drowned).mean() > 3 * error, (clear.mean(), drowned.mean())
    # Where the update says nothing, the mean film of the label is left.
    label = int(inputs.labels[0])
    got = reconstruct(look(inputs, sketch, 0, 1e6), estimate).images[0, 0].numpy()
    np.testing.assert_allclose(got, own.images[own.labels == label].mean(0) / 255.0, atol=1e-4)


def test_all_of_the_clipping_bound_goes_to_the_scores(gradients):
    """The hidden layer gets no gradient, and each film's is as long as clipping lets it be."""
    last = 3 * 8 + 3
    assert float(gradients[:, :-last].abs().max()) == 0
    length = gradients.norm(dim=1)
    assert float(length.max()) <= 1 + 1e-6 and float(length.median()) > 0.999


def test_wrong_views_and_sizes_are_named(inputs, sketch, own, gradients, estimate):
    view, norms = look(inputs, sketch, 0, 0.5), inputs.normalisation
    for call, word in (
        (lambda: reconstruct(simulate_view(inputs.subset([0]), SKETCH, sketch), estimate), "private"),
        (lambda: reconstruct(view, LinearEstimator(gradients[:, 1:], own.images, own.labels)), "size"),
        (lambda: reconstruct(view, LinearEstimator(gradients, own.images[:, ::2], own.labels)), "size"),
        (lambda: LinearEstimator(gradients[1:], own.images, own.labels), "each"),
        (lambda: LinearEstimator(gradients[:1], own.images[:1], own.labels[:1]), "two"),
        (lambda: reconstruct(view, LinearEstimator(gradients, own.images, np.full(len(own), 7))), "label"),
        (lambda: pca_weights(sketch, own.images, norms, components=9), "units"),
        (lambda: pca_weights(sketch, own.images[:, ::2], norms), "size"),
        (lambda: pca_weights(initial_state(Training("convnet"), inputs), own.images, norms), "mlp"),
    ):
        with pytest.raises(UserError, match=word):
            call()
