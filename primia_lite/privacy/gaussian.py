"""The Gaussian mechanism without sampling, exactly, and what it says of sampled steps in the limit of many.

``mu`` is sensitivity over noise, as in Gaussian DP (Dong, Roth and Su 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from primia_lite.config import UserError

if TYPE_CHECKING:
    from primia_lite.privacy.accounting import Release


def check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"delta is {delta}: it must be in (0, 1), and well below 1 / number of units")


def gaussian_delta(epsilon, mu: float) -> np.ndarray:
    """δ at each ε (Balle and Wang 2018, theorem 8)."""
    size = np.abs(epsilon)
    delta = _delta_at(size / mu - mu / 2, mu)
    return np.where(epsilon < 0, -np.expm1(-size) + np.exp(-size) * delta, delta)


def _delta_at(z, mu: float):
    """δ at ε = μ (z + μ / 2) ≥ 0: Φ(-z) - e^ε Φ(-z - μ), written so that nothing overflows."""
    from scipy.special import erfcx, ndtr

    return ndtr(-z) - np.exp(-z * z / 2) * erfcx((z + mu) / math.sqrt(2)) / 2


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The inverse of :func:`gaussian_delta`, rounded up; infinite where a float can't hold it."""
    from scipy.optimize import brentq
    from scipy.special import ndtri

    check_delta(delta)
    if not mu >= 0:
        raise UserError(f"mu is {mu}: it must be 0 or more")
    if mu * mu == math.inf:
        return math.inf
    if mu == 0 or _delta_at(-mu / 2, mu) <= delta:
        return 0.0
    low, high = max(-mu / 2, -40.0), 1e-6 - float(ndtri(delta))  # there δ is 1 (or ε is 0), and already too small
    z = brentq(lambda z: _delta_at(z, mu) - delta, low, high, xtol=1e-13, maxiter=1000)
    return mu * (z + 1e-13 + mu / 2)


def unsampled_mu(releases: Iterable[Release]) -> float:
    """μ of the same noise in full batches: μ² = Σ steps / σ²."""
    return math.hypot(*(math.sqrt(r.steps) / r.noise_multiplier for r in releases))


def clt_mu(releases: Iterable[Release]) -> float:
    """μ² = Σ steps / σ² over full batches, exactly, plus Σ steps q² (exp(1 / σ²) - 1) over sampled ones, the limit of
    many steps (Bu, Dong, Long, Su 2020)."""
    releases = list(releases)
    sampled = sum(  # no sum overflows by an exponent of at most 300
        r.sample_rate**2 * r.steps * math.expm1(min(300.0, r.noise_multiplier**-2))
        for r in releases
        if r.sample_rate < 1
    )
    return math.hypot(math.sqrt(sampled), unsampled_mu(r for r in releases if r.sample_rate == 1))
