"""ε against exact values and against Opacus's own accountants."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from primia_lite.config import UserError
from primia_lite.privacy.accounting import Release, calibrate_noise_multiplier, epsilon, merge
from primia_lite.privacy.dpsgd import Privacy


def exact_gaussian_epsilon(sigma: float, delta: float) -> float:
    """Balle and Wang (ICML 2018), theorem 8."""

    def gap(eps: float) -> float:
        return norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma) - delta

    return brentq(gap, 1e-9, 200)


@pytest.mark.parametrize("sigma", [0.8, 2.0, 5.0])
@pytest.mark.parametrize("steps", [1, 9])
def test_full_batches_match_the_exact_gaussian(sigma, steps):
    exact = exact_gaussian_epsilon(sigma / math.sqrt(steps), 1e-4)
    ours = epsilon(Release(sigma, 1.0, steps), 1e-4)
    assert exact - 1e-6 <= ours <= exact * 1.01  # an upper bound, and a tight one


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.2, 0.1, 50), (2.0, 0.25, 60)])
def test_subsampled_agrees_with_opacus(sigma, q, steps):
    # Opacus's PRV returns an upper bound as well; both are within a few per cent of the truth.
    prv = PRVAccountant()
    prv.history = [(sigma, q, steps)]
    assert epsilon(Release(sigma, q, steps), 1e-4) == pytest.approx(prv.get_epsilon(1e-4, eps_error=0.05), abs=0.11)


def test_rdp_bounds_from_above():
    release = Release(1.0, 0.2, 40)
    pld, rdp = epsilon(release, 1e-4), epsilon(release, 1e-4, "rdp")
    assert pld < rdp < 1.6 * pld


@given(st.floats(0.8, 3), st.sampled_from([0.05, 0.2, 1.0]), st.integers(1, 20))
@settings(max_examples=8, deadline=None)
def test_more_steps_cost_more_and_more_noise_less(sigma, q, steps):
    one = epsilon(Release(sigma, q, steps), 1e-4)
    assert epsilon(Release(sigma, q, steps + 5), 1e-4) >= one
    assert epsilon(Release(sigma * 1.3, q, steps), 1e-4) <= one


def test_nothing_costs_nothing_and_merging_keeps_the_sum():
    assert epsilon([], 1e-5) == 0
    parts = [Release(1.0, 0.1, 3), Release(2.0, 1.0, 1), Release(1.0, 0.1, 4)]
    assert merge(parts) == (Release(1.0, 0.1, 7), Release(2.0, 1.0, 1))
    assert epsilon(parts, 1e-4) == epsilon(merge(parts), 1e-4)


@pytest.mark.parametrize(("target", "q", "steps"), [(8.0, 0.25, 20), (1.0, 0.1, 50), (0.5, 1.0, 10)])
def test_calibration_meets_its_target_from_below(target, q, steps):
    sigma = calibrate_noise_multiplier(target, 1e-4, q, steps)
    spent = epsilon(Release(sigma, q, steps), 1e-4)
    assert 0.99 * target <= spent <= target


def test_calibration_leaves_room_for_what_else_is_released_and_for_spare_steps():
    other = (Release(10.0, 1.0, 1),)
    alone = calibrate_noise_multiplier(8.0, 1e-4, 0.25, 20)
    shared = Privacy.for_budget(8.0, sample_rate=0.25, steps=20, max_grad_norm=1.0, also=other)
    assert shared.noise_multiplier > alone
    assert 7.9 <= epsilon([*other, shared.release(0.25, 20)], 1e-4) <= 8.0
    spare = Privacy.for_budget(8.0, sample_rate=0.25, steps=20, max_grad_norm=1.0, spare_steps=2)
    assert spare.epsilon(0.25, 22) <= 8.0 < spare.epsilon(0.25, 24)
    with pytest.raises(UserError, match="beside what else is released"):
        calibrate_noise_multiplier(1.0, 1e-4, 0.25, 20, (Release(0.5, 1.0, 1),))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Release(0.0, 0.1, 1), "noise_multiplier is 0"),
        (lambda: Release(float("nan"), 0.1, 1), "noise_multiplier is nan"),
        (lambda: Release(1.0, 0.0, 1), "sample_rate is 0"),
        (lambda: Release(1.0, 1.5, 1), "sample_rate is 1.5"),
        (lambda: Release(1.0, 0.5, -1), "steps is -1"),
        (lambda: epsilon([], 0.0), "delta is 0"),
        (lambda: epsilon([], 1e-4, "moments"), "unknown accountant 'moments'"),
        (lambda: calibrate_noise_multiplier(0.0, 1e-4, 0.1, 10), "target_epsilon is 0"),
        (lambda: calibrate_noise_multiplier(0.001, 1e-4, 1.0, 10**6), "no noise multiplier"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
