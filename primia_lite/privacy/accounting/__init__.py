"""What a series of noisy releases costs: ε at a given δ, from both sides, and the noise for a wanted ε.

The mechanism is the Poisson-subsampled Gaussian of DP-SGD (Abadi et al., CCS 2016).

Adjacency is *zero-out* (Kairouz, McMahan, Song, Thakkar, Thakurta, Xu 2021): one unit, a patient with all their films
or a film, is replaced by an empty one; how many units a hospital has is public. An empty unit adds a gradient of zero,
sampled or not, so a step's sum is N(0, σ²) around what the others add, and with the unit in place it is that, moved by
a vector of length 1 at most with probability q. Adding or removing a unit gives the same two distributions, so what is
known about those holds, in both directions.

Four accountants, of which two are bounds to rely on. They are those of Google's dp-accounting and of Opacus; ours is
what keeps them bounds where floats end, and quick:

- ``pld``: privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), rounded pessimistically from above,
  optimistically from below; the worse of the two directions counts. Full batches compose to one Gaussian, whose ε is
  exact. Where floats don't hold the distribution (a δ near 1e-15 a step), the better of two looser bounds: ``rdp``,
  and the same noise without sampling.
- ``prv``: privacy random variables (Gopi, Lee, Wutschitz 2021), in the direction of removal; refused where no bound.
- ``rdp``: Rényi DP (Mironov 2017): looser, and the only one that holds when parameters are chosen along the way, as a
  filter at whole orders.
- ``gdp``: Gaussian DP: exact for full batches; for sampled ones the central limit theorem (Bu, Dong, Long, Su 2020), an
  approximation that may understate ε.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from primia_lite.config import UserError
from primia_lite.privacy.accounting import pld, prv
from primia_lite.privacy.accounting.gaussian import clt_mu, gaussian_epsilon
from primia_lite.privacy.accounting.rdp import RDP_ORDERS, rdp_epsilon
from primia_lite.privacy.accounting.releases import Release, Releases, check_delta, merge, one_gaussian, unsampled_mu

ACCOUNTANTS = {
    "pld": "upper bound, by privacy loss distributions",
    "prv": "upper bound, by privacy random variables: removal only",
    "rdp": "upper bound, by Rényi DP: looser",
    "gdp": "central limit approximation: may understate; exact for full batches",
}


@dataclass(frozen=True)
class Bracket:
    """ε from both sides: the truth lies between ``lower`` and ``upper``; only ``upper`` may be promised."""

    lower: float
    estimate: float
    upper: float

    @property
    def gap(self) -> float:
        """(upper - lower) / upper."""
        return (self.upper - self.lower) / self.upper if self.upper else 0.0


def epsilon(releases: Releases, delta: float, accountant: str = "pld") -> float:
    """ε of everything released, at ``delta``; 0 for nothing. An upper bound, but for ``gdp``.

    Raises
    ------
    UserError
        ``prv`` can't count this, see above.
    """
    check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise UserError(f"unknown accountant {accountant!r}: choose one of {', '.join(ACCOUNTANTS)}")
    return _epsilon(merge(releases), delta, accountant)


@lru_cache(maxsize=512)
def _epsilon(releases: tuple[Release, ...], delta: float, accountant: str) -> float:
    if not releases:
        return 0.0
    if accountant == "gdp":
        return gaussian_epsilon(clt_mu(releases), delta)
    if accountant == "prv":
        return _bracket(releases, delta, "prv").upper
    if accountant == "rdp":
        return max(0.0, float(rdp_epsilon(releases, RDP_ORDERS, delta).min()))
    # Sampling hides: the same noise without it costs at least as much, and what that costs is known exactly.
    unsampled = gaussian_epsilon(unsampled_mu(releases), delta)
    if unsampled == 0 or all(r.sample_rate == 1 for r in releases):
        return unsampled
    tight = pld.upper_epsilon(one_gaussian(releases), delta)
    if math.isinf(tight):  # floats don't resolve so small a δ, or so wide a distribution
        tight = _epsilon(releases, delta, "rdp")
    return min(tight, unsampled)


def epsilon_bracket(releases: Releases, delta: float, accountant: str = "pld") -> Bracket:
    """ε of everything released from below, estimated, and from above.

    Parameters
    ----------
    accountant
        ``pld`` (both directions, the worse one; the estimate is the middle; slow where many steps share a small ε, 45 s
        for 3,000 steps at rate 0.01) or ``prv`` (removal only).

    Raises
    ------
    UserError
        What the accountant can't count; ``pld`` finds no lower bound for an ε of hundreds, or for very many steps.
    """
    check_delta(delta)
    if accountant not in ("pld", "prv"):
        raise UserError(f"accountant {accountant!r} gives no lower bound: choose pld or prv")
    releases = merge(releases)
    return _bracket(releases, delta, accountant) if releases else Bracket(0.0, 0.0, 0.0)


@lru_cache(maxsize=256)
def _bracket(releases: tuple[Release, ...], delta: float, accountant: str) -> Bracket:
    upper = _epsilon(releases, delta, "pld")
    if accountant == "prv":
        return Bracket(*prv.bounds(one_gaussian(releases), delta, upper))
    if all(r.sample_rate == 1 for r in releases):
        return Bracket(upper * (1 - 2e-12), upper * (1 - 1e-12), upper)  # exact, but for rounding
    lower = min(upper, pld.lower_epsilon(one_gaussian(releases), delta, upper))
    return Bracket(lower, (lower + upper) / 2, upper)


@lru_cache(maxsize=64)
def calibrate_noise_multiplier(
    target_epsilon: float, target_delta: float, sample_rate: float, steps: int, also: tuple[Release, ...] = ()
) -> float:
    """The smallest σ, 0.1 or more, whose ε over ``steps`` is at most ``target_epsilon`` by PLD, in 4 decimals.

    ``also``: other releases that share the budget. Raises UserError for a ``target_epsilon`` that is out of reach.
    """
    from scipy.optimize import brentq

    if not target_epsilon > 0:
        raise UserError(f"target_epsilon is {target_epsilon}: it must be above 0")

    def excess(sigma: float) -> float:
        # Bounded: where σ is small ε may be infinite, which no root finder takes.
        return min(epsilon([*also, Release(sigma, sample_rate, steps)], target_delta) - target_epsilon, 1e9)

    low, high, most = 0.1, 1.0, 500.0
    if excess(low) <= 0:
        return low
    while excess(high) > 0:
        if high == most:
            raise UserError(
                f"no noise multiplier up to {most:g} reaches epsilon {target_epsilon} over {steps} steps at sample "
                f"rate {sample_rate}{' beside what else is released' if also else ''}: take fewer steps, a smaller "
                "sample rate, or a larger epsilon"
            )
        low, high = high, min(2 * high, most)
    sigma = math.ceil(brentq(excess, low, high, xtol=1e-5) * 1e4) / 1e4
    while excess(sigma) > 0:
        sigma = round(sigma + 1e-4, 4)
    return sigma
