"""Privacy loss distributions of the subsampled Gaussian, rounded pessimistically: δ and ε from above.

Koskela et al. 2020; Doroshenko et al. 2022; composed by Google's dp-accounting.
Releases are merged, with at most one of full batches among them.
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

import numpy as np

from primia_lite.config import UserError
from primia_lite.privacy.gaussian import clt_mu, gaussian_delta

if TYPE_CHECKING:
    from primia_lite.privacy.accounting import Release

POINTS = 2**18  # of a grid of privacy losses, about, at most


def upper_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """ε from above; infinite where floats don't resolve it."""
    interval = grid_interval(releases)
    if delta <= rounding(releases) or interval >= 1:
        return math.inf
    return float(composed(releases, interval).get_epsilon_for_delta(delta - rounding(releases)))


def lower_epsilon(releases: tuple[Release, ...], delta: float, upper: float) -> float:
    """ε from below, given its upper bound.

    Raises
    ------
    UserError
        It would take too fine a grid.
    """
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    # Optimistic rounding loses about half a grid interval a step: a grid that keeps this at 0.15 % of ε.
    interval = float(np.clip(0.003 * upper / sum(r.steps for r in releases), 1e-6, 5e-4))
    if (points := max(map(_loss_range, releases)) / interval) > 2**23:
        raise UserError(
            f"a lower bound of this epsilon, {upper:.4g} at most, would take a grid of {points:.2g} privacy losses: "
            "use epsilon(), which needs none"
        )
    optimistic = {"pessimistic_estimate": False, "use_connect_dots": False, "value_discretization_interval": interval}
    parts = (
        from_gaussian_mechanism(r.noise_multiplier, sampling_prob=r.sample_rate, **optimistic).self_compose(r.steps)
        for r in releases
    )
    total = reduce(lambda one, other: one.compose(other), parts)
    return float(total.get_epsilon_for_delta(delta + rounding(releases)))


def rounding(releases: tuple[Release, ...]) -> float:
    """The most that rounding and cut tails move a composed δ: several times what was seen against exact Gaussians."""
    return 1e-16 * sum(r.steps for r in releases) + 2e-15 * len(releases)


def _loss_range(release: Release) -> float:
    """The range of a step's privacy loss but for e^-50 of it, at most."""
    return (0.5 / release.noise_multiplier + 20) / release.noise_multiplier


def grid_interval(releases: tuple[Release, ...]) -> float:
    """A grid for privacy losses. Any keeps the upper bound; this one keeps ε within 0.01 % of the best grid's.

    Connecting the dots adds about a tenth of the squared interval to the variance of each step's loss. A much finer
    grid adds rounding. A power of two: a ledger that grows keeps its grid, and what was counted on it.
    """
    scale = clt_mu(releases) / math.sqrt(sum(r.steps for r in releases))
    # At most so large are a step's mean loss and, but for large ones, half the variance (Rényi's order 2).
    mean = float(sum(r.steps * np.logaddexp(0, 2 * math.log(r.sample_rate) + r.noise_multiplier**-2) for r in releases))
    coarsest = (mean + 10 * math.sqrt(2 * mean) + max(map(_loss_range, releases))) / POINTS
    return 2.0 ** math.floor(math.log2(max(min(0.03 * scale, 0.01), coarsest, 1e-8)))


@lru_cache(maxsize=256)
def composed(releases: tuple[Release, ...], interval: float, bit: int = 0):
    """Pessimistic privacy loss distribution of all releases.

    Divided by one bit after the other of a hash: when a ledger grows by a release, only the divisions that hold it are
    composed anew, and the result is the same however it grew.
    """
    if len(releases) == 1:
        (release,) = releases
        step = _step(release.noise_multiplier, release.sample_rate, interval)
        return step.self_compose(release.steps) if release.steps > 1 else step
    sides = [
        tuple(r for r in releases if hash((r.noise_multiplier, r.sample_rate)) >> bit & 1 == side) for side in (0, 1)
    ]
    first, *second = [composed(side, interval, bit + 1) for side in sides if side]
    return first.compose(second[0]) if second else first


@lru_cache(maxsize=64)
def _step(noise_multiplier: float, sample_rate: float, interval: float):
    """Pessimistic privacy loss distribution of one step, both directions, by connecting the dots.

    As ``from_gaussian_mechanism`` of dp-accounting, which takes losses one at a time and some hundred times as long.
    """
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

    pmfs = []
    for direction in (AdjacencyType.REMOVE, AdjacencyType.ADD):
        loss = GaussianPrivacyLoss(noise_multiplier, sampling_prob=sample_rate, adjacency_type=direction)
        bounds = loss.connect_dots_bounds()
        low, high = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
        delta = _step_delta(
            np.arange(low, high + 1) * interval, noise_multiplier, sample_rate, direction is AdjacencyType.REMOVE
        )
        pmfs.append(pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, delta))
    return PrivacyLossDistribution(*pmfs)


def _step_delta(epsilon: np.ndarray, noise_multiplier: float, sample_rate: float, remove: bool) -> np.ndarray:
    """δ(ε) of one step in one direction; from the Gaussian's δ, as by Balle, Barthe, Gaboardi (2018, theorem 2)."""
    sign = 1.0 if remove else -1.0
    never = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf  # no output is less likely with the unit by more
    inside = sign * epsilon > never
    exponent = sign * np.where(inside, epsilon, 0.0)
    # The loss of the Gaussian alone: log(1 + (e^x - 1) / q), which is x - log q + log(1 - (1 - q) e^-x) for a large x.
    large = np.maximum(exponent, 30.0)
    with np.errstate(divide="ignore"):  # minus infinity is right
        small = np.log1p(np.expm1(np.minimum(exponent, 30.0)) / sample_rate)
    far = large - math.log(sample_rate) + np.log1p((sample_rate - 1) * np.exp(-large))
    plain = np.where(exponent > 30, far, small)
    delta = gaussian_delta(sign * plain, 1 / noise_multiplier)
    if remove:
        delta = np.where(inside, sample_rate * delta, -np.expm1(np.minimum(epsilon, 0.0)))
    else:
        delta = np.where(inside, -np.expm1(np.minimum(epsilon + never, 0.0)) * delta, 0.0)
    return np.clip(delta, 0.0, 1.0)
