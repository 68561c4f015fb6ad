"""Lower bounds on ε: against jax_privacy's values, against enumeration, and that they don't lie."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import binom

from primia_lite.attacks.bounds import (
    MOST,
    clopper_pearson_epsilon,
    error_rates,
    gaussian_mu,
    mechanism_epsilon,
    one_run_epsilon,
    one_run_gaussian_epsilon,
    one_run_p_value,
    two_sample_bounds,
    two_sample_excess,
)
from primia_lite.config import UserError
from primia_lite.privacy.accounting import Release, epsilon
from primia_lite.privacy.accounting.gaussian import gaussian_epsilon


# By the functions behind epsilon_one_run and epsilon_one_run_fdp of jax_privacy 2.0.0's CanaryScoreAuditor.
@pytest.mark.parametrize(
    ("counts", "steinke", "f_dp"),
    [
        ((95, 100, 1000, 1e-5, 0.05), 2.16518, 3.32330),
        ((58, 60, 5000, 1e-4, 0.05), 1.00622, 2.29786),
        ((480, 500, 5000, 1e-4, 0.05), 2.62353, 3.52441),
        ((700, 1000, 10000, 1e-6, 0.01), 0.68495, 0.95930),
        ((50, 50, 200, 1e-5, 0.05), 2.77905, 5.12093),
        ((4500, 5000, 10000, 1e-4, 1e-6), 0.0, 1.36735),
    ],
)
def test_one_run_bounds_are_those_of_jax_privacy(counts, steinke, f_dp):
    assert one_run_epsilon(*counts) == pytest.approx(steinke, abs=3e-5)
    assert one_run_gaussian_epsilon(*counts) == pytest.approx(f_dp, abs=3e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("right", "guesses", "canaries"), [(3, 4, 10), (40, 50, 100), (0, 5, 5), (7, 7, 9)])
def test_the_p_value_by_enumeration(epsilon, right, guesses, canaries):
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = sum(binom.pmf(k, guesses, chance) for k in range(right, guesses + 1))
    assert one_run_p_value(right, guesses, canaries, epsilon, 0.0) == pytest.approx(tail)
    worst = max(
        (sum(binom.pmf(k, guesses, chance) for k in range(right - i, right)) / i for i in range(1, right + 1)),
        default=0,
    )
    with_delta = min(1.0, tail + 2 * canaries * 1e-3 * worst)
    assert one_run_p_value(right, guesses, canaries, epsilon, 1e-3) == pytest.approx(with_delta)


def test_randomised_response_is_bounded_by_its_epsilon_and_nearly_reached():
    """Each canary's bit is told right with probability e^ε / (1 + e^ε): the audit's worst case."""
    rng, epsilon = np.random.default_rng(0), 2.0
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    found = [one_run_epsilon(int(rng.binomial(2000, chance)), 2000, 2000, 0.0, 1e-6) for _ in range(50)]
    assert max(found) <= epsilon and np.mean(found) > 1.5


def test_bounds_of_a_gaussian_stay_below_its_epsilon_and_come_near():
    rng, mu, delta = np.random.default_rng(1), 1.5, 1e-4
    true = gaussian_epsilon(mu, delta)
    found = two_sample_bounds(rng.normal(mu, 1, 20_000), rng.normal(0, 1, 20_000), delta, alpha=1e-6)
    assert found.epsilon <= found.gaussian_epsilon <= true and found.gaussian_epsilon > 0.85 * true
    assert found.epsilon > 2
    # The same rates under the mechanism itself, one full batch of noise 1 / mu.
    own = mechanism_epsilon(partial(two_sample_excess, found.gaussian_rates), Release(1.0, 1.0, 1), delta)
    assert own == pytest.approx(found.gaussian_epsilon, rel=0.05) and own <= found.gaussian_epsilon + 1e-9


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_the_bound_for_sampled_noise_stays_below_its_epsilon_and_comes_near(sigma):
    rng, release, delta, n = np.random.default_rng(3), Release(sigma, 0.5, 10), 1e-4, 20_000

    def scores(present):
        z = rng.normal(0, sigma, (n, 10)) + present * (rng.random((n, 10)) < 0.5)
        return np.log1p(0.5 * np.expm1((z - 0.5) / sigma**2)).sum(1)

    found = two_sample_bounds(scores(1), scores(0), delta, alpha=1e-6)
    own = mechanism_epsilon(partial(two_sample_excess, found.gaussian_rates), release, delta)
    assert 0.7 * epsilon(release, delta) < own <= epsilon(release, delta)


def test_nothing_is_found_where_nothing_is_to_be_found():
    rng = np.random.default_rng(2)
    found = two_sample_bounds(rng.normal(size=4000), rng.normal(size=4000), 1e-5, alpha=1e-6)
    assert found.epsilon == found.gaussian_epsilon == 0
    assert one_run_epsilon(50, 100, 1000, 1e-5) == one_run_gaussian_epsilon(50, 100, 1000, 1e-5) == 0


def test_a_perfect_attack_is_bounded_by_its_number_of_runs():
    present, absent = np.ones(2000), np.zeros(2000)
    found = two_sample_bounds(present, absent, 1e-5).epsilon
    assert math.log(1000 / 4.2) < found < math.log(1000 / 3.2)
    assert clopper_pearson_epsilon((0.0, 0.0), 0.0) <= MOST and gaussian_mu((0.5, 0.5)) == 0
    assert error_rates(present, absent, 0.5, 0.05)[0] == pytest.approx(3.69 / 2000, rel=0.01)


@pytest.mark.parametrize(
    ("present", "absent", "word"),
    [
        (np.ones(3), np.zeros(100), "at least"),
        (np.ones(9), np.full(9, np.nan), "finite"),
        ([], np.zeros(9), "at least"),
    ],
)
def test_scores_that_say_nothing_are_refused(present, absent, word):
    with pytest.raises(UserError, match=word):
        two_sample_bounds(present, absent, 1e-5)


@pytest.mark.parametrize("counts", [(3, 2, 10), (1, 11, 10), (0, 0, 10), (-1, 2, 10)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(UserError, match="guess"):
        one_run_epsilon(*counts, 1e-5)
