"""What ε says of a child with several films, of several hospitals, of tuning, and of an attacker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from primia_lite.config import UserError
from primia_lite.privacy.accounting import epsilon, pld
from primia_lite.privacy.accounting.gaussian import gaussian_epsilon
from primia_lite.privacy.accounting.rdp import RDP_ORDERS, quiet
from primia_lite.privacy.accounting.releases import Release, Releases, check_delta, merge, one_gaussian, unsampled_mu


@lru_cache(maxsize=64)
def group_epsilon(release: Release, films: int, delta: float) -> float:
    """What noise calibrated for one film gives a child with so many, each sampled on its own: an upper bound.

    In a step Binomial(k, q) of the child's films take part, and their clipped gradients may all point one way: a
    mixture of Gaussians (Choquette-Choo et al. 2023), composed by PLD.
    """
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
    from dp_accounting.pld import PLDAccountant
    from scipy.stats import binom

    if films < 1:
        raise UserError(f"films is {films}: a child has at least one")
    if films == 1 or not release.steps:
        return epsilon(release, delta)
    mu = films * unsampled_mu([release])
    always = gaussian_epsilon(mu, delta)  # all films in every step cost at least as much
    if release.sample_rate == 1 or delta <= pld.rounding((release,)) or always == 0:
        return always
    count = range(films + 1)
    shares = list(binom.pmf(count, films, release.sample_rate))
    # ε grows faster than k, and with it the width of the distribution: a coarser grid keeps it affordable, and the
    # value an upper bound.
    interval = max(0.01 * max(1.0, films / 5), (mu * mu / 2 + 20 * mu) / pld.POINTS)
    accountant = PLDAccountant(value_discretization_interval=interval)
    accountant.compose(MixtureOfGaussiansDpEvent(release.noise_multiplier, list(count), shares), release.steps)
    return min(always, float(accountant.get_epsilon(delta - pld.rounding((release,)))))


def group_privacy(epsilon: float, delta: float, films: int) -> tuple[float, float]:
    """(kε, k e^((k-1)ε) δ): what (ε, δ) for one film implies for k of them (Vadhan 2017, lemma 2.2). A δ of 1 or more
    promises nothing."""
    check_delta(delta)
    if films < 1 or not epsilon >= 0:
        raise UserError(f"films is {films}, epsilon {epsilon}: take at least one film, and an epsilon of 0 or more")
    exponent = (films - 1) * epsilon
    return films * epsilon, films * delta * math.exp(exponent) if exponent < 700 else math.inf


def federation_epsilon(spent: Mapping[str, Releases], delta: float, *, shared_patients: bool = False) -> float:
    """ε of a federation from each hospital's releases: that of the worst hospital if a child is at one only, of all
    releases together if ``shared_patients`` says that a child may be at all of them."""
    if shared_patients:
        return epsilon([r for releases in spent.values() for r in merge(releases)], delta)
    return max((epsilon(releases, delta) for releases in spent.values()), default=0.0)


def selection_epsilon(trial: Releases, mean_trials: float, delta: float) -> float:
    """ε of running a trial a Poisson number of times and releasing the best one only.

    Papernot and Steinke (2022), by RDP. Needs a score that costs no ε of its own, such as one on films outside the
    protected set. If every trial's result is seen, ``epsilon`` of all of them together is what was spent.
    """
    import dp_accounting
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    check_delta(delta)
    if not mean_trials >= 1:
        raise UserError(f"mean_trials is {mean_trials}: it must be at least 1")
    run = dp_accounting.ComposedDpEvent([release.event() for release in merge(trial)])
    accountant = RdpAccountant(RDP_ORDERS)
    with quiet():
        accountant.compose(RepeatAndSelectDpEvent(run, mean_trials, math.inf))
    return float(accountant.get_epsilon(delta))


def tpr_upper_bound(releases: Releases, false_positive_rate: np.ndarray) -> np.ndarray:
    """An upper bound on the true positive rate of any test for one unit's presence, at each false positive rate.

    A test of (ε, δ(ε))-DP obeys TPR ≤ e^ε FPR + δ and, read backwards, TPR ≤ 1 - e^-ε (1 - δ - FPR) for every ε
    (Wasserman and Zhou 2010; Kairouz, Oh, Viswanath 2015); the least of these bounds over a grid of ε, by PLD.
    """
    from scipy.special import ndtr, ndtri

    rate = np.asarray(false_positive_rate, dtype=float)
    releases = merge(releases)
    if not releases:
        return rate
    unsampled = ndtr(ndtri(rate) + unsampled_mu(releases))  # exact for full batches (Dong, Roth, Su 2022)
    releases = one_gaussian(releases)
    if all(r.sample_rate == 1 for r in releases) or (interval := pld.grid_interval(releases)) >= 1:
        return unsampled
    # Any grid gives a bound; beyond 700 e^ε overflows, and such an ε promises nothing.
    grid = np.linspace(0, min(700.0, max(1.0, 1.5 * epsilon(releases, 1e-6))), 400)
    delta = np.asarray(pld.composed(releases, interval).get_delta_for_epsilon(grid))[:, None] + pld.rounding(releases)
    forward = np.exp(grid)[:, None] * rate + delta
    backward = 1 - np.exp(-grid)[:, None] * (1 - delta - rate)
    return np.minimum(unsampled, np.minimum(forward, backward).min(0))
