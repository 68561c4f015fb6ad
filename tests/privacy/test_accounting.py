"""ε against exact values and against Opacus's own accountants."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, norm

from primia_lite.config import UserError
from primia_lite.privacy.accounting import (
    Release,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_bracket,
    merge,
)
from primia_lite.privacy.accounting.gaussian import clt_mu, gaussian_epsilon
from primia_lite.privacy.accounting.guarantees import (
    federation_epsilon,
    group_epsilon,
    group_privacy,
    selection_epsilon,
    tpr_upper_bound,
)
from primia_lite.privacy.accounting.rdp import filter_epsilon, filter_order
from primia_lite.privacy.dpsgd import Privacy


def exact_gaussian_epsilon(sigma: float, delta: float) -> float:
    """Balle and Wang (ICML 2018), theorem 8."""

    def gap(eps: float) -> float:
        return norm.cdf(0.5 / sigma - eps * sigma) - math.exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma) - delta

    return brentq(gap, 1e-9, 200)


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
    with pytest.raises(UserError, match="beside"):
        calibrate_noise_multiplier(1.0, 1e-4, 0.25, 20, (Release(0.5, 1.0, 1),))


# --- from both sides --------------------------------------------------------------------------------------------------

TYPICAL = [Release(1.5616, 0.25, 101), Release(8.1332, 0.25, 101), Release(14.9237, 0.25, 101), Release(5.46, 1.0, 101)]


@pytest.mark.parametrize("release", TYPICAL)
def test_the_bracket_is_tight_and_both_accountants_agree(release):
    pld, prv = epsilon_bracket(release, 1e-4), epsilon_bracket(release, 1e-4, "prv")
    assert pld.lower < pld.estimate < pld.upper and pld.gap <= 0.01
    # Two libraries, two methods, intervals that both claim to hold the truth.
    assert max(pld.lower, prv.lower) <= min(pld.upper, prv.upper)
    assert pld.upper <= epsilon(release, 1e-4)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 20.0])
@pytest.mark.parametrize("accountant", ["pld", "prv"])
def test_the_bracket_holds_the_exact_gaussian(sigma, accountant):
    exact = exact_gaussian_epsilon(sigma / 3, 1e-5)
    bracket = epsilon_bracket(Release(sigma, 1.0, 9), 1e-5, accountant)
    assert bracket.lower <= exact <= bracket.upper + 1e-9
    mixed = epsilon_bracket([Release(sigma, 1.0, 9), Release(2.0, 0.25, 60)], 1e-5, accountant)
    assert bracket.upper < mixed.lower


def test_the_central_limit_may_understate():
    release = Release(0.8, 0.1, 5)
    assert epsilon(release, 1e-4, "gdp") < epsilon_bracket(release, 1e-4).lower
    # and is near where noise is large and steps are many
    many = Release(20.0, 0.1, 2000)
    assert epsilon(many, 1e-4, "gdp") == pytest.approx(epsilon(many, 1e-4), rel=0.01)
    assert clt_mu([many]) == pytest.approx(0.1 * math.sqrt(2000 * math.expm1(1 / 400)))


def test_the_accountants_are_ordered_as_labelled():
    release = TYPICAL[0]
    assert epsilon(release, 1e-4, "pld") <= epsilon(release, 1e-4, "prv") * 1.001
    assert epsilon(release, 1e-4, "prv") < epsilon(release, 1e-4, "rdp") <= filter_epsilon(release, 1e-4, 3) * 1.0001


# --- where floats end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "gdp"])
@pytest.mark.parametrize(
    ("releases", "mu"),
    [
        ([Release(0.02, 1.0, 1)], 50.0),
        ([Release(0.01, 1.0, 1)], 100.0),
        ([Release(1e-4, 1.0, 1)], 1e4),
        ([Release(5.46, 1.0, 101)], math.sqrt(101) / 5.46),
        ([Release(3.0, 1.0, 9), Release(4.0, 1.0, 16)], math.sqrt(2)),
        ([Release(2.0 + n, 1.0, 1) for n in range(40)], math.sqrt(sum((2.0 + n) ** -2 for n in range(40)))),
    ],
)
def test_full_batches_are_one_gaussian_exactly(accountant, releases, mu):
    for delta in (1e-4, 1e-12, 1e-30):
        assert epsilon(releases, delta, accountant) == pytest.approx(gaussian_epsilon(mu, delta), rel=1e-9)
    bracket = epsilon_bracket(releases, 1e-5)
    assert bracket.lower <= gaussian_epsilon(mu, 1e-5) <= bracket.upper * (1 + 1e-9) and bracket.gap < 1e-9


def test_gaussian_dp_is_that_of_dp_accounting_and_mixes_with_sampled_steps():
    from dp_accounting.pld import privacy_loss_distribution as pld

    theirs = pld.from_gaussian_mechanism(4.0, value_discretization_interval=1e-4).self_compose(10)
    assert epsilon(Release(4.0, 1.0, 10), 1e-5, "gdp") == pytest.approx(theirs.get_epsilon_for_delta(1e-5), rel=1e-4)
    full, sampled = Release(4.0, 1.0, 10), Release(20.0, 0.1, 2000)
    assert clt_mu([full, sampled]) == pytest.approx(math.hypot(math.sqrt(10) / 4, clt_mu([sampled])))
    assert epsilon([full, sampled], 1e-5, "gdp") == pytest.approx(epsilon([full, sampled], 1e-5), rel=0.01)


def test_the_exact_gaussian_neither_overflows_nor_hangs():
    for mu, delta in ((1e-9, 1e-5), (1e-3, 1e-5), (1e3, 1e-5), (1e10, 1e-5), (1.0, 1e-30), (1.0, 1e-300), (7.0, 0.9)):
        value = gaussian_epsilon(mu, delta)
        # Between what a tail bound and the tail of the loss alone give (the loss is N(mu^2 / 2, mu^2)).
        assert 0 <= value <= max(0.0, mu * (mu / 2 - norm.ppf(delta))) * (1 + 1e-9) + 1e-9
        assert value == 0 or value >= mu * (mu / 2 - norm.ppf(delta)) * 0.3 - mu
    assert gaussian_epsilon(1e200, 1e-5) == math.inf and gaussian_epsilon(0.0, 1e-5) == 0
    # By mpmath, with 60 digits.
    assert gaussian_epsilon(1.0, 1e-20) == pytest.approx(9.5109362405743805, rel=1e-12)
    assert gaussian_epsilon(1.0, 1e-100) == pytest.approx(21.6275080936483822, rel=1e-12)
    assert gaussian_epsilon(50.0, 1e-5) == pytest.approx(1462.28501596477979, rel=1e-12)


@cache
def composed(release: Release, interval: float):
    """Privacy losses by dp-accounting alone, from below."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        release.noise_multiplier,
        sampling_prob=release.sample_rate,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=interval,
    ).self_compose(release.steps)


@pytest.mark.parametrize(
    ("release", "interval"),
    [
        (Release(0.1, 0.5, 1), 1e-2),
        (Release(0.05, 0.3, 1), 5e-2),
        (Release(0.3, 0.1, 100), 1e-2),
        (Release(0.5, 0.5, 200), 1e-2),
        (Release(1.0, 0.01, 3000), 5e-4),
        (Release(2.0, 0.25, 60), 1e-3),
        (Release(1.0, 0.5, 2), 1e-3),
        (Release(20.0, 0.2, 500), 1e-4),
    ],
)
@pytest.mark.parametrize("delta", [1e-4, 1e-9, 1e-12, 1e-15, 1e-30])
def test_every_accountant_bounds_from_above_or_refuses(release, interval, delta):
    below = composed(release, interval).get_epsilon_for_delta(max(delta, 1e-13) * 1.01 + 1e-14)
    rdp, pld = epsilon(release, delta, "rdp"), epsilon(release, delta, "pld")
    assert below <= pld <= rdp * (1 + 1e-6) and math.isfinite(pld)
    try:
        prv = epsilon(release, delta, "prv")
    except UserError as error:
        assert "use pld" in str(error) and (delta < 1e-9 or pld > 300)
    else:
        assert below <= prv == pytest.approx(pld, rel=0.01)
        assert epsilon_bracket(release, delta, "prv").lower <= pld


@pytest.mark.parametrize(
    ("releases", "delta", "why"),
    [
        (Release(0.02, 1.0, 1), 1e-5, "overflows"),
        (Release(0.01, 0.5, 1), 1e-5, "overflows"),
        (Release(1e-4, 0.5, 1), 1e-5, "690"),
        (Release(1.0, 1.0, 1000), 1e-5, "690"),
        (Release(1.0, 0.2, 10), 1e-12, "rounding"),
        (Release(1.0, 1.0, 1), 1e-300, "rounding"),
        (Release(200.0, 0.5, 3 * 10**6), 1e-5, "GiB"),
    ],
)
def test_prv_refuses_where_it_is_no_bound(releases, delta, why):
    with pytest.raises(UserError, match=why):
        epsilon(releases, delta, "prv")
    assert epsilon(releases, delta) < math.inf  # and here is what to use instead


def test_losses_that_floats_do_not_hold_are_bounded_by_the_noise_without_sampling():
    for sigma in (0.02, 0.01, 1e-3, 1e-5, 1e-12):
        exact, sampled = gaussian_epsilon(1 / sigma, 1e-5), epsilon(Release(sigma, 0.5, 1), 1e-5)
        assert sampled <= exact and sampled >= 0.98 * exact  # sampling takes off log 2 or so
        assert tpr_upper_bound(Release(sigma, 0.5, 1), [0.01])[0] <= 1
    for releases in (Release(0.05, 0.5, 1000), [Release(0.01, 0.5, 1), Release(400.0, 0.01, 10**5)]):
        assert 0 < epsilon(releases, 1e-5) < math.inf
        assert math.isfinite(epsilon(releases, 1e-5, "rdp"))
    with pytest.raises(UserError, match="lower"):
        epsilon_bracket(Release(0.005, 0.5, 1), 1e-5)
    assert group_epsilon(Release(0.1, 0.5, 10), 30, 1e-30) == gaussian_epsilon(30 * math.sqrt(10) / 0.1, 1e-30)


def epsilon_by_fft(sigma, q, steps, delta, width=80.0, cells=2**20):
    """The worse direction of the Poisson-subsampled Gaussian, by convolving privacy losses: numpy and scipy alone."""
    grid, found = (np.arange(cells) - cells // 2) * width / cells, []
    y = np.linspace(-14 * sigma, 14 * sigma + 1, 1_000_001)
    absent = norm.pdf(y, 0, sigma)
    present = (1 - q) * absent + q * norm.pdf(y, 1, sigma)
    for seen, other in ((present, absent), (absent, present)):
        place = np.clip(np.round(np.log(seen / other) / width * cells).astype(int) + cells // 2, 0, cells - 1)
        one = np.bincount(place, seen * (y[1] - y[0]), minlength=cells)
        total = np.fft.fftshift(np.fft.irfft(np.fft.rfft(np.fft.ifftshift(one)) ** steps, cells)).clip(0)
        low, high = 0.0, width / 2
        for _ in range(40):
            middle = (low + high) / 2
            beyond = grid > middle
            too_much = total[beyond] @ -np.expm1(middle - grid[beyond]) > delta
            low, high = (middle, high) if too_much else (low, middle)
        found.append(high)
    return max(found)


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.01, 7), (0.5, 0.5, 1), (5.0, 0.25, 40), (0.8, 0.999, 3)])
def test_epsilon_is_that_of_losses_convolved_by_hand(sigma, q, steps):
    assert epsilon(Release(sigma, q, steps), 1e-6) == pytest.approx(epsilon_by_fft(sigma, q, steps, 1e-6), rel=2e-3)


def test_fractional_orders_bound_more_closely_and_stay_bounds():
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    for sigma, q, steps in (
        (0.3, 0.01, 100),
        (0.5, 0.1, 100),
        (0.8, 0.25, 50),
        (0.6, 0.9, 10),
        (1.5, 0.5, 40),
        (4.0, 1.0, 9),
    ):
        theirs = RdpAccountant()
        theirs.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
        ours = epsilon(Release(sigma, q, steps), 1e-5, "rdp")
        assert epsilon(Release(sigma, q, steps), 1e-5) <= ours <= theirs.get_epsilon(1e-5) * (1 + 1e-9)
    whole = RdpAccountant(list(range(2, 65)))
    whole.compose(PoissonSampledDpEvent(0.01, GaussianDpEvent(0.3)), 100)
    assert epsilon(Release(0.3, 0.01, 100), 1e-5, "rdp") < 0.2 * whole.get_epsilon(1e-5)


def test_rdp_says_nothing_of_orders_that_do_not_converge(capfd):
    assert epsilon(Release(0.51, 0.49, 3), 1e-5, "rdp") > 0
    assert "converge" not in capfd.readouterr().err


def test_calibration_reaches_what_only_the_tight_count_allows():
    sigma = calibrate_noise_multiplier(0.02, 1e-10, 1.0, 1)
    assert 0.99 * 0.02 <= epsilon(Release(sigma, 1.0, 1), 1e-10) <= 0.02
    assert calibrate_noise_multiplier(1e5, 1e-4, 0.5, 1) == 0.1
    sigma = calibrate_noise_multiplier(8.0, 1e-30, 0.25, 20)
    assert 0.95 * 8 <= epsilon(Release(sigma, 0.25, 20), 1e-30) <= 8


def test_zero_out_and_add_or_remove_are_one_pair_of_distributions():
    """A patient against an empty record: enumerated over who is sampled, one step in one dimension."""
    sigma, q, eps = 1.3, 0.3, 0.4
    x = np.linspace(-14, 14, 200_001)

    def density(gradients):
        total = np.zeros_like(x)
        for taken in np.ndindex(*(2,) * len(gradients)):
            weight = np.prod(np.where(taken, q, 1 - q))
            total += weight * norm.pdf(x, np.dot(taken, gradients), sigma)
        return total

    for others in ([], [0.4, -0.9], [-1.0, -1.0, -1.0]):
        there, empty, gone = density([*others, 1.0]), density([*others, 0.0]), density(others)
        np.testing.assert_allclose(empty, gone, atol=1e-15)
        delta = max(
            np.trapezoid(np.clip(one - math.exp(eps) * other, 0, None), x)
            for one, other in ((there, empty), (empty, there))
        )
        counted = epsilon(Release(sigma, q, 1), delta)  # at this δ the accountant must not promise less than eps
        assert counted >= eps * (1 - 1e-6) and (others or counted == pytest.approx(eps, rel=1e-3))


# --- parameters chosen along the way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 5, 30])
def test_the_filter_is_the_sum_of_renyi_divergences(order):
    """Full batches: the divergence of order a is a / (2 sigma^2) a step, whatever was chosen when (Mironov 2017)."""
    releases = [Release(3.0, 1.0, 4), Release(7.0, 1.0, 2)]
    rdp = order / 2 * (4 / 9 + 2 / 49)
    want = rdp + math.log(1 - 1 / order) - math.log(1e-5 * order) / (order - 1)
    assert filter_epsilon(releases, 1e-5, order) == pytest.approx(want, rel=1e-9)
    assert filter_epsilon(releases, 1e-5, order) >= epsilon(releases, 1e-5)


def test_the_filters_order_is_the_best_for_what_is_planned():
    plan = TYPICAL[0]
    order = filter_order(8.0, 1e-4, plan)
    assert all(filter_epsilon(plan, 1e-4, order) <= filter_epsilon(plan, 1e-4, other) for other in (2, 3, 4, 8, 20))
    # without a plan: the order under which a given budget holds most full-batch releases
    for target in (0.5, 1.0, 8.0):
        order = filter_order(target, 1e-4)

        def room(order, target=target):
            return (target - filter_epsilon(Release(1e6, 1.0, 1), 1e-4, order)) / order

        assert all(room(order) >= room(other) - 1e-9 for other in (2, 3, 5, 9, 14, 24, 40) if room(other) < target / 2)


# --- units, hospitals, tuning -----------------------------------------------------------------------------------------


def test_a_child_with_one_film_has_the_films_epsilon_and_one_with_more_a_larger_one():
    release = Release(1.5616, 0.25, 101)
    values = [group_epsilon(release, k, 1e-4) for k in (1, 2, 14)]
    assert values[0] == epsilon(release, 1e-4)
    assert values[1] == pytest.approx(19.7, abs=0.2) and values[2] == pytest.approx(404, abs=3)
    # The formula is far looser: at the same ε it allows a δ of more than a half, or of anything.
    assert group_privacy(8.0, 1e-4, 2)[1] > 0.5 and group_privacy(8.0, 1e-4, 200)[1] == math.inf
    assert group_privacy(0.5, 1e-5, 3) == (1.5, pytest.approx(3e-5 * math.e))
    assert group_privacy(1.0, 1e-5, 1) == (1.0, 1e-5)


def test_a_childs_epsilon_bounds_what_a_simulated_attacker_reaches():
    """One step, by numerical integration of the mixture itself: nothing shared with dp-accounting."""
    exact = exact_gaussian_epsilon(6.0 / 3 / math.sqrt(10), 1e-4)  # in full batches
    assert group_epsilon(Release(6.0, 1.0, 10), 3, 1e-4) == pytest.approx(exact, rel=0.001)
    sigma, q, k, delta = 1.0, 0.3, 3, 1e-3
    x = np.linspace(-12, 15, 400_001)
    absent = norm.pdf(x, 0, sigma)
    present = sum(binom.pmf(j, k, q) * norm.pdf(x, j, sigma) for j in range(k + 1))

    def gap(eps):
        worst = max(
            np.trapezoid(np.clip(p - math.exp(eps) * r, 0, None), x) for p, r in ((present, absent), (absent, present))
        )
        return worst - delta

    assert group_epsilon(Release(sigma, q, 1), k, delta) == pytest.approx(brentq(gap, 0.01, 20), rel=2e-3)


def test_hospitals_take_the_maximum_and_a_shared_child_composes():
    spent = {"A": Release(2.0, 0.25, 30), "B": Release(3.0, 0.25, 30), "C": ()}
    alone = epsilon(spent["A"], 1e-4)
    assert federation_epsilon(spent, 1e-4) == alone
    shared = federation_epsilon(spent, 1e-4, shared_patients=True)
    assert alone < shared <= alone + epsilon(spent["B"], 1e-4)
    assert federation_epsilon({}, 1e-4) == 0


def test_trying_more_costs_more_and_selection_less_than_showing_all():
    trial = Release(4.0, 0.25, 50)
    one = epsilon(trial, 1e-4, "rdp")
    few, many = selection_epsilon(trial, 3, 1e-4), selection_epsilon(trial, 30, 1e-4)
    assert one < few < many < epsilon([trial] * 30, 1e-4)


def test_an_attackers_true_positive_rate_is_the_exact_one_of_the_gaussian():
    rates = np.array([0.0, 1e-4, 0.01, 0.1, 0.5, 1.0])
    exact = norm.cdf(norm.ppf(rates) + 0.5)
    np.testing.assert_allclose(tpr_upper_bound(Release(4.0, 1.0, 4), rates), exact, atol=2e-4)
    np.testing.assert_allclose(tpr_upper_bound([], rates), rates)
    absurd = tpr_upper_bound(Release(10**-0.2, 1.0, 301), rates)
    assert np.isfinite(absurd).all() and (absurd <= 1).all() and absurd[2] > 0.99


def test_no_test_on_samples_beats_the_stated_rate():
    """The likelihood ratio on 200,000 draws of one subsampled step, in both directions."""
    sigma, q, n = 1.0, 0.4, 200_000
    rng = np.random.default_rng(0)
    absent, present = rng.normal(0, sigma, n), rng.normal(rng.random(n) < q, sigma)
    rates = np.array([0.001, 0.01, 0.1, 0.3])
    reached = np.mean(present > np.quantile(absent, 1 - rates)[:, None], axis=1)
    bound = tpr_upper_bound(Release(sigma, q, 1), rates)
    assert (reached <= bound + 4 * np.sqrt(bound / n) + 1e-3).all()
    assert (reached >= bound * 0.55).all()  # the bound serves both directions, so one alone stays below it


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: Release(0.0, 0.1, 1), "noise_multiplier"),
        (lambda: Release(math.nan, 0.5, 1), "noise_multiplier"),
        (lambda: Release(math.inf, 0.5, 1), "noise_multiplier"),
        (lambda: Release(1e-200, 0.5, 1), "noise_multiplier"),
        (lambda: Release(1.0, 0.0, 1), "sample_rate"),
        (lambda: Release(1.0, 1.5, 1), "sample_rate"),
        (lambda: Release(1.0, math.nan, 1), "sample_rate"),
        (lambda: Release(1.0, 0.5, -1), "steps"),
        (lambda: Release(1.0, 0.5, 1.5), "steps"),
        (lambda: epsilon([], 0.0), "delta"),
        (lambda: epsilon([], 1e-4, "moments"), "accountant"),
        (lambda: epsilon_bracket(TYPICAL[0], 1e-4, "rdp"), "lower bound"),
        (lambda: gaussian_epsilon(1.0, 1.0), "delta"),
        (lambda: gaussian_epsilon(math.nan, 1e-5), "mu"),
        (lambda: filter_epsilon(TYPICAL[0], 1.0, 3), "delta"),
        (lambda: group_epsilon(TYPICAL[0], 0, 1e-4), "films"),
        (lambda: group_privacy(1.0, 1e-5, 0), "films"),
        (lambda: group_privacy(math.nan, 1e-5, 2), "epsilon"),
        (lambda: selection_epsilon(TYPICAL[0], 0.5, 1e-4), "mean_trials"),
        (lambda: calibrate_noise_multiplier(0.0, 1e-4, 0.1, 10), "target_epsilon"),
        (lambda: calibrate_noise_multiplier(0.001, 1e-4, 1.0, 10**6), "noise multiplier"),
    ],
)
def test_bad_values_are_named(call, word):
    with pytest.raises(UserError, match=word):
        call()
