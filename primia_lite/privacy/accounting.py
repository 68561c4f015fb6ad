"""What a series of noisy releases costs: ε at a given δ, and the noise for a wanted ε.

Mechanism: the Poisson-subsampled Gaussian of DP-SGD (Abadi et al., CCS 2016). Adjacency: add or remove one unit (a
film). Accountant: privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022) from Google's dp-accounting,
rounded pessimistically, so that the ε returned is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from primia_lite.config import UserError

# Integer orders: their moments have a closed form; the fractional ones don't converge at large sample rates.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
ACCOUNTANTS = {"pld": PLDAccountant, "rdp": lambda: RdpAccountant(_ORDERS)}


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
        if not self.noise_multiplier > 0:
            raise UserError(f"noise_multiplier is {self.noise_multiplier}: it must be above 0 (0 protects nobody)")
        if not 0 < self.sample_rate <= 1:
            raise UserError(f"sample_rate is {self.sample_rate}: it must be in (0, 1]")
        if self.steps < 0:
            raise UserError(f"steps is {self.steps}: it must not be negative")

    def event(self) -> dp_accounting.DpEvent:
        step = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sample_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(self.sample_rate, step)
        return dp_accounting.SelfComposedDpEvent(step, self.steps)


def merge(releases: Iterable[Release]) -> tuple[Release, ...]:
    """Add up the steps of equal mechanisms; the order of composition doesn't matter."""
    steps: dict[tuple[float, float], int] = {}
    for release in releases:
        key = (release.noise_multiplier, release.sample_rate)
        steps[key] = steps.get(key, 0) + release.steps
    return tuple(sorted(Release(*key, count) for key, count in steps.items() if count))


def epsilon(releases: Release | Iterable[Release], delta: float, accountant: str = "pld") -> float:
    """ε of everything released, at ``delta``; 0 for nothing.

    Raises
    ------
    UserError
        ``delta`` outside (0, 1) or an unknown accountant.
    """
    if not 0 < delta < 1:
        raise UserError(f"delta is {delta}: it must be in (0, 1), and well below 1 / number of units")
    if accountant not in ACCOUNTANTS:
        raise UserError(f"unknown accountant {accountant!r}: choose one of {', '.join(ACCOUNTANTS)}")
    return _epsilon(merge([releases] if isinstance(releases, Release) else releases), delta, accountant)


@lru_cache(maxsize=512)
def _epsilon(releases: tuple[Release, ...], delta: float, accountant: str) -> float:
    if not releases:
        return 0.0
    total = ACCOUNTANTS[accountant]()
    for release in releases:
        total.compose(release.event())
    return float(total.get_epsilon(delta))


@lru_cache(maxsize=64)
def calibrate_noise_multiplier(
    target_epsilon: float, target_delta: float, sample_rate: float, steps: int, also: tuple[Release, ...] = ()
) -> float:
    """The smallest σ, rounded up to 4 decimals, whose ε over ``steps`` is at most ``target_epsilon``.

    ``also``: other releases that share the budget.

    RDP brackets the answer in milliseconds; the slower PLD accountant then settles it.

    Raises
    ------
    UserError
        ``target_epsilon`` is not above 0 or out of reach.
    """
    if not target_epsilon > 0:
        raise UserError(f"target_epsilon is {target_epsilon}: it must be above 0")

    def excess(sigma: float, accountant: str) -> float:
        return epsilon([*also, Release(sigma, sample_rate, steps)], target_delta, accountant) - target_epsilon

    low, high = 0.3, 500.0
    if excess(high, "rdp") > 0:
        raise UserError(
            f"no noise multiplier up to {high:g} reaches epsilon {target_epsilon} over {steps} steps at sample rate "
            f"{sample_rate}{' beside what else is released' if also else ''}: take fewer steps, a smaller sample "
            "rate, or a larger epsilon"
        )
    if excess(low, "rdp") > 0:
        high = brentq(excess, low, high, args=("rdp",), xtol=1e-4) + 1e-4
        # PLD is slow where σ is small: start from close below, and step down only if need be.
        low = max(low, 0.85 * high)
        while excess(low, "pld") < 0 and low > 0.2:
            low, high = 0.85 * low, low
    else:
        high = low
        low = 0.1
    if excess(low, "pld") > 0:
        high = brentq(excess, low, high, args=("pld",), xtol=2e-4)
    else:
        high = low
    sigma = math.ceil(high * 1e4) / 1e4
    while excess(sigma, "pld") > 0:
        sigma = round(sigma + 1e-4, 4)
    return sigma
