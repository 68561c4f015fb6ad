"""What a series of noisy releases costs: ε at a given δ, from both sides, and the noise for a wanted ε.

Mechanism: the Poisson-subsampled Gaussian of DP-SGD (Abadi et al., CCS 2016).

Adjacency: *zero-out* (Kairouz, McMahan, Song, Thakkar, Thakurta, Xu 2021). One unit, a patient with all their films or
a film, is replaced by an empty one; how many units a hospital has is public. An empty unit adds a gradient of zero
whether it is sampled or not, so a step's sum is N(0, σ²) around what the others add, and with the unit in place it is
that, moved by a vector of length 1 at most with probability q. These are the two distributions of adding or removing
a unit, too, so all that is known about those holds, in both directions.

Four accountants, of which two are bounds to rely on:

- ``pld``: privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022) by Google's dp-accounting. Rounded
  pessimistically they bound ε from above, optimistically from below; the worse of the two directions counts. Full
  batches compose to one Gaussian, whose ε is exact. Where floats don't hold the distribution (a δ near 1e-15 a step),
  the better of two looser bounds: ``rdp``, and the same noise without sampling.
- ``prv``: privacy random variables (Gopi, Lee, Wutschitz 2021) by Opacus, in the direction of removal. Refused where
  it would be no bound: losses above 690, a grid above 1 GiB, a δ that is lost in rounding.
- ``rdp``: Rényi DP (Mironov 2017): an upper bound, looser, and the only one here that holds when parameters are chosen
  along the way (:mod:`primia_lite.privacy.filter`, at whole orders).
- ``gdp``: Gaussian DP: exact for full batches; for sampled ones the central limit theorem (Bu, Dong, Long, Su 2020), an
  approximation that may understate ε.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from primia_lite.config import UserError
from primia_lite.privacy import pld, prv
from primia_lite.privacy.gaussian import check_delta, clt_mu, gaussian_epsilon, unsampled_mu

if TYPE_CHECKING:  # imported where used: a process that only trains is there in half the time
    import dp_accounting

# Fractional orders are what counts where ε is large. One whose series doesn't converge is infinite, and drops out.
RDP_ORDERS = (*(n / 10 for n in range(11, 110)), *range(11, 65), 80, 96, 128, 192, 256, 512, 1024)
ACCOUNTANTS = {
    "pld": "upper bound, by privacy loss distributions",
    "prv": "upper bound, by privacy random variables: removal only",
    "rdp": "upper bound, by Rényi DP: looser",
    "gdp": "central limit approximation: may understate; exact for full batches",
}


@dataclass(frozen=True, order=True)
class Release:
    """Some steps of one subsampled Gaussian mechanism.

    Attributes
    ----------
    noise_multiplier
        σ: standard deviation of the noise over the L2 sensitivity of one unit.
    sample_rate
        q in (0, 1]: the probability with which each unit takes part in a step.
    steps
        How many times.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self):
        if not 1e-12 <= float(self.noise_multiplier) <= 1e100:
            raise UserError(
                f"noise_multiplier is {self.noise_multiplier}: it must be from 1e-12 (less protects nobody) to 1e100"
            )
        if not 0 < self.sample_rate <= 1:
            raise UserError(f"sample_rate is {self.sample_rate}: it must be in (0, 1]")
        if not (isinstance(self.steps, (int, np.integer)) and self.steps >= 0):
            raise UserError(f"steps is {self.steps}: it must be a whole number, not negative")
        # Plain numbers: NumPy's are refused by JSON and SQLite.
        for name, number in (("noise_multiplier", float), ("sample_rate", float), ("steps", int)):
            object.__setattr__(self, name, number(getattr(self, name)))

    def event(self) -> dp_accounting.DpEvent:
        import dp_accounting

        step = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sample_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(self.sample_rate, step)
        return dp_accounting.SelfComposedDpEvent(step, self.steps)


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


Releases = Release | Iterable[Release]


def merge(releases: Releases) -> tuple[Release, ...]:
    """Add up the steps of equal mechanisms; the order of composition doesn't matter."""
    steps: dict[tuple[float, float], int] = {}
    for release in [releases] if isinstance(releases, Release) else releases:
        key = (release.noise_multiplier, release.sample_rate)
        steps[key] = steps.get(key, 0) + release.steps
    return tuple(sorted(Release(*key, count) for key, count in steps.items() if count))


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


def one_gaussian(releases: tuple[Release, ...]) -> tuple[Release, ...]:
    """The same with all full batches as one step: Gaussians compose to a Gaussian, exactly."""
    sampled = tuple(r for r in releases if r.sample_rate < 1)
    if len(sampled) == len(releases):
        return sampled
    return (*sampled, Release(1 / unsampled_mu(r for r in releases if r.sample_rate == 1), 1.0, 1))


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
        What the accountant can't count (see :func:`epsilon`); ``pld`` finds no lower bound for an ε of hundreds, or for
        very many steps.
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


# --- Rényi DP ---------------------------------------------------------------------------------------------------------


def rdp_epsilon(releases: Iterable[Release], orders: tuple[float, ...], delta: float) -> np.ndarray:
    """ε by the divergence of each order (Canonne, Kamath and Steinke 2020, proposition 12); it may be below 0."""
    alpha = np.array(orders)
    divergence = sum((r.steps * _divergence(r.noise_multiplier, r.sample_rate, orders) for r in releases), 0.0)
    return divergence + np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)


@lru_cache(maxsize=4096)
def _divergence(noise_multiplier: float, sample_rate: float, orders: tuple[float, ...]) -> np.ndarray:
    """Rényi divergences of one step, float64 [orders]."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders)
    with quiet():
        accountant.compose(Release(noise_multiplier, sample_rate, 1).event())
    return np.maximum(accountant._rdp, 0.0)


@contextmanager
def quiet() -> Iterator[None]:
    """Without dp-accounting's word on each order that doesn't converge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- noise for a wanted ε ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def calibrate_noise_multiplier(
    target_epsilon: float, target_delta: float, sample_rate: float, steps: int, also: tuple[Release, ...] = ()
) -> float:
    """The smallest σ, 0.1 or more, whose ε over ``steps`` is at most ``target_epsilon`` by PLD, in 4 decimals.

    ``also``: other releases that share the budget.

    Raises
    ------
    UserError
        ``target_epsilon`` is not above 0 or out of reach.
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
