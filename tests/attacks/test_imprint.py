"""A malicious server's imprint layer reads films out of a batch, a sum, and several local steps; noise stops it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_cases import GUESSING, seen
from torch.nn import functional as F

from primia_lite import metrics
from primia_lite.attacks import (
    ImprintReading,
    ThreatModel,
    clipped_gradients,
    clipping_alone,
    imprint_weights,
    initial_state,
    orthogonal_weights,
    reconstruct,
    simulate_view,
)
from primia_lite.config import UserError
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.training import Training

IMPRINT = Training("imprintnet", sample_rate=1.0, learning_rate=1.0, model_options={"bins": 512})


def exact_share(gallery, reconstruction, index) -> float:
    """Of the films, found at more than 40 dB."""
    return float(np.mean(best_psnr(gallery, reconstruction, index) > 40))


def best_psnr(gallery, reconstruction, index) -> np.ndarray:
    images = reconstruction.images.numpy()
    return np.array([max(metrics.psnr(image, gallery.films[i]) for image in images) for i in index])


@pytest.fixture(scope="module")
def malicious(films, public):
    return imprint_weights(initial_state(IMPRINT, films), public, films.normalisation)


@pytest.mark.parametrize("privacy", [None, clipping_alone(1.0)], ids=["plain", "clipped"])
def test_an_imprint_layer_copies_the_films_of_a_batch(privacy, films, malicious, gallery):
    out = reconstruct(seen(films, range(16), GUESSING, privacy, malicious, IMPRINT), ImprintReading())
    assert exact_share(gallery, out, range(16)) >= 0.9
    assert len(out.images) <= 16 and out.labels.tolist() == [-1] * len(out.images)
    assert 0 <= out.loss <= 1 and 0 <= out.images.min() <= out.images.max() <= 1


def test_secure_aggregation_alone_doesnt_hide_films_from_an_imprint_layer(films, malicious, gallery):
    places = [films.subset(range(8 * k, 8 * k + 8)) for k in range(3)]
    out = reconstruct(
        simulate_view(places, IMPRINT, malicious, ThreatModel("malicious", "malicious", "sum")), ImprintReading()
    )
    assert exact_share(gallery, out, range(24)) >= 0.9 and len(out.images) <= 24


def test_nor_do_local_steps(films, malicious, gallery):
    recipe = IMPRINT.changed(
        sample_rate=0.5, local_steps=None, local_epochs=2, learning_rate=0.01, model_options={"bins": 512, "gain": 0.1}
    )
    view = seen(films, range(16), GUESSING, None, malicious, recipe)
    assert view.local_steps == 4 and view.n_films == 8
    assert exact_share(gallery, reconstruct(view, ImprintReading(), n_films=16), range(16)) >= 0.8
    assert len(reconstruct(view, ImprintReading()).images) <= 8


def test_but_noise_does(films, malicious, gallery):
    alone, noisy = (
        best_psnr(
            gallery,
            reconstruct(seen(films, range(16), GUESSING, privacy, malicious, IMPRINT), ImprintReading()),
            range(16),
        )
        for privacy in (clipping_alone(1.0), Privacy(0.5, 1.0, 1e9, unit="film"))
    )
    assert np.median(alone) > 40 and noisy.max() < 25


def test_weights_without_an_imprint_copy_few_films(films, gallery):
    view = seen(films, range(16), GUESSING, None, initial_state(IMPRINT, films), IMPRINT)
    assert exact_share(gallery, reconstruct(view, ImprintReading()), range(16)) < 0.2


def test_an_imprint_needs_only_public_films_and_keeps_the_rest(films, public, malicious):
    state = initial_state(IMPRINT, films)
    assert all(torch.equal(malicious[n], v) for n, v in state.items() if not n.startswith("imprint."))
    again = imprint_weights(state, public, films.normalisation)
    assert all(torch.equal(again[name], value) for name, value in malicious.items())
    # Windows hold equal shares: a public film's units, saturated up to its window, are spread over all bins.
    x = films.normalise(torch.from_numpy(public).flatten(1).float() / 255)
    below = ((x @ malicious["imprint.weight"].T + malicious["imprint.bias"]) > 0).double()
    for half in (below[:, :256], below[:, 256:]):
        quantiles = half.mean(1).sort().values
        assert (quantiles - torch.linspace(0, 1, len(public), dtype=torch.float64)).abs().max() < 0.15


def test_candidates_gradients_hardly_overlap_under_orthogonal_weights(films, chest):
    recipe = IMPRINT.changed(model_options={"bins": 40})
    state = initial_state(recipe, films)

    def largest(state):
        g = F.normalize(clipped_gradients(state, films, recipe, 1.0).double(), dim=1)
        return float((g @ g.T - torch.eye(40)).abs().max())

    planted = orthogonal_weights(state, chest.images, films.normalisation)
    assert planted.keys() == state.keys() and largest(planted) < 0.1 < 0.5 < largest(state)
    twice = np.concatenate([chest.images[:10], chest.images[:10]])  # equal films share a window
    assert all(torch.isfinite(v).all() for v in orthogonal_weights(state, twice, films.normalisation).values())


def test_what_an_imprint_cant_do_is_said(films, public, chest, malicious):
    state = initial_state(IMPRINT, films)
    with pytest.raises(UserError, match="size"):
        imprint_weights(state, public[:, :30, :30], films.normalisation)
    few = initial_state(IMPRINT.changed(model_options={"bins": 8}), films)
    with pytest.raises(UserError, match="bins"):
        orthogonal_weights(few, chest.images, films.normalisation)
    with pytest.raises(UserError, match="imprintnet"):
        reconstruct(seen(films, [0]), ImprintReading())
    blind = {**malicious, "imprint.bias": torch.full_like(malicious["imprint.bias"], 1e6)}
    with pytest.raises(UserError, match="window"):
        reconstruct(seen(films, [0, 1], GUESSING, None, blind, IMPRINT), ImprintReading())
