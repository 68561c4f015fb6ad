"""ε of the Gaussian mechanism without sampling, exactly, and what it says of sampled steps in the limit of many.

``mu`` is sensitivity over noise, as in Gaussian DP (Dong, Roth and Su 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from primia_lite.config import UserError
from primia_lite.privacy.accounting.releases import Release, check_delta, unsampled_mu


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of the Gaussian mechanism (Balle and Wang 2018, theorem 8), rounded up; infinite beyond what a float holds."""
    from scipy.optimize import brentq
    from scipy.special import erfcx, ndtr, ndtri

    def delta_at(z: float) -> float:
        # δ at ε = μ (z + μ / 2) ≥ 0: Φ(-z) - e^ε Φ(-z - μ), written so that nothing overflows.
        return ndtr(-z) - math.exp(-z * z / 2) * erfcx((z + mu) / math.sqrt(2)) / 2

    check_delta(delta)
    if not mu >= 0:
        raise UserError(f"mu is {mu}: it must be 0 or more")
    if mu * mu == math.inf:
        return math.inf
    if mu == 0 or delta_at(-mu / 2) <= delta:
        return 0.0
    low, high = max(-mu / 2, -40.0), 1e-6 - float(ndtri(delta))  # there δ is 1 (or ε is 0), and already too small
    z = brentq(lambda z: delta_at(z) - delta, low, high, xtol=1e-13, maxiter=1000)
    return mu * (z + 1e-13 + mu / 2)


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
