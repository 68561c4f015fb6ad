"""Privacy loss distributions of the subsampled Gaussian by Google's dp-accounting: δ and ε from above, ε from below.

Ours is the choice of the grid, on which time, memory and tightness depend. Releases are merged, with at most one of
full batches among them.
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce

import numpy as np

from primia_lite.config import UserError
from primia_lite.privacy.accounting.gaussian import clt_mu
from primia_lite.privacy.accounting.releases import Release

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
        raise UserError(f"a lower bound would take a grid of {points:.2g} privacy losses: use epsilon(), an upper one")
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
    """Privacy loss distribution of all releases, rounded pessimistically, in both directions.

    Divided by one bit after the other of a hash: when a ledger grows by a release, only the divisions that hold it are
    composed anew, and the result is the same however it grew.
    """
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    if len(releases) == 1:
        (r,) = releases
        step = from_gaussian_mechanism(
            r.noise_multiplier, sampling_prob=r.sample_rate, value_discretization_interval=interval
        )
        return step.self_compose(r.steps) if r.steps > 1 else step
    sides = [
        tuple(r for r in releases if hash((r.noise_multiplier, r.sample_rate)) >> bit & 1 == side) for side in (0, 1)
    ]
    return reduce(lambda one, other: one.compose(other), (composed(side, interval, bit + 1) for side in sides if side))
