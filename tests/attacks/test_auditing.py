"""Audits stay below the claim of the product's own step, and find each planted bug."""

import numpy as np
import pytest
import torch

from primia_lite.attacks import SUSPECTS, audit
from primia_lite.attacks.auditing import log_likelihood_ratio
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.privacy import Privacy, Release
from primia_lite.training import Training


def recipe(epsilon: float, sample_rate: float, steps: int, local_steps: int = 1, **options):
    training = Training(sample_rate=sample_rate, local_steps=local_steps, label_smoothing=0.1, weight_decay=1e-4)
    return training, Privacy.for_budget(epsilon, sample_rate=sample_rate, steps=steps, max_grad_norm=0.25, **options)


@pytest.mark.parametrize("unit", ["patient", "film"])
@pytest.mark.parametrize(
    ("epsilon", "sample_rate", "steps", "local_steps", "how", "n"),
    [(8, 0.5, 10, 1, "one run", 1000), (1, 0.5, 10, 2, "one run", 1000), (8, 1.0, 2, 2, "many runs", 60),
     (4, 0.5, 2, 1, "many runs", 60), (0.5, 1.0, 1, 1, "low bits", 60)],
)  # fmt: skip
def test_a_bound_on_the_products_step_stays_below_its_epsilon(epsilon, sample_rate, steps, local_steps, how, n, unit):
    training, privacy = recipe(epsilon, sample_rate, steps, local_steps, unit=unit)
    for found in audit(training, privacy, how=how, n=n, alpha=1e-6):
        assert max(found.epsilon, found.mechanism_epsilon) <= found.claimed == pytest.approx(epsilon, rel=0.01)
        assert not found.refuted and "REFUTED" not in str(found)


def test_one_run_comes_near_what_is_claimed():
    found = {f.how: f for f in audit(*recipe(8, 0.5, 40), n=5000, seed=1)}
    whole, released = found["one run, every update"], found["one run, released model"]
    assert whole.epsilon > 2.6 and whole.mechanism_epsilon > 4 and released.epsilon > 2.4
    assert whole.n == len(whole.present) + len(whole.absent) == 5000


def test_many_runs_of_a_full_batch_come_near_what_is_claimed():
    (found,) = audit(*recipe(8, 1.0, 1), n=400, seed=1)
    assert 4 < found.mechanism_epsilon < 8 and 1 < found.epsilon < 8


@pytest.mark.parametrize(
    ("bug", "settings", "how", "n"),
    [
        ("half_the_noise", (8, 1.0, 1), "many runs", 200),
        ("clips_films", (8, 1.0, 1), "many runs", 200),
        ("divides_by_batch", (8, 1.0, 1), "many runs", 200),
        ("repeats_noise", (1, 0.5, 10), "one run", 500),
        ("keeps_batches", (2, 0.05, 400), "one run", 2000),
        ("adds_floats", (0.5, 1.0, 1), "low bits", 100),
    ],
)
def test_each_planted_bug_is_found(bug, settings, how, n):
    found = audit(*recipe(*settings), how=how, n=n, compute_update=SUSPECTS[bug], alpha=0.01, seed=0)
    assert any(f.refuted for f in found), [str(f) for f in found]


def test_a_network_that_is_trained_whole_is_audited_by_many_runs():
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.normal(size=(12, 1, 1, 8, 8)).astype(np.float32))
    films = Films(inputs, torch.arange(12) % 3, (np.arange(12) // 2).astype(str), model="mlp")
    training = Training("mlp", sample_rate=1.0, model_options={"hidden": 4})
    privacy = Privacy.for_budget(8, sample_rate=1.0, steps=1, max_grad_norm=0.1)
    (found,) = audit(training, privacy, films, n=60, seed=0)
    assert 0.5 < found.mechanism_epsilon < 8


def test_the_likelihood_ratio_by_enumeration():
    """Two steps in a round: the canary in none, one or both of them."""
    release, noisy = Release(0.7, 0.3, 2), np.array([-0.4, 1.3])
    density = lambda times: np.exp(-((noisy - times) ** 2) / (2 * 2 * 0.49))  # noqa: E731
    expected = np.log(0.49 * density(0) + 0.42 * density(1) + 0.09 * density(2)) - np.log(density(0))
    assert log_likelihood_ratio(noisy, np.ones(2), release, 1) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"n": 3}, "canaries"), ({"n": 3, "how": "many runs"}, "runs"), ({"how": "guessing"}, "guessing"),
     ({"privacy": Privacy(1.0, 0.25, 8.0)}, "steps"), ({"training": Training("mlp")}, "whole")],
)  # fmt: skip
def test_what_cannot_be_audited_is_refused(changes, word):
    training, privacy = recipe(8, 0.5, 4)
    with pytest.raises(UserError, match=word):
        audit(**{"training": training, "privacy": privacy, **changes})
