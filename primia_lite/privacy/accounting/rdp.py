"""Rényi DP (Mironov 2017): ε of a fixed plan, and of releases that were chosen along the way.

The second is a *filter* (Feldman and Zrnic 2021): if a mechanism stops before the sum of its Rényi divergences of one
order, fixed in advance, exceeds a bound, then it has that bound as a whole, however its parameters were chosen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np

from primia_lite.privacy.accounting.releases import Release, Releases, check_delta, merge

# Fractional orders are what counts where ε is large. One whose series doesn't converge is infinite, and drops out.
RDP_ORDERS = (*(n / 10 for n in range(11, 110)), *range(11, 65), 80, 96, 128, 192, 256, 512, 1024)
FILTER_ORDERS = (*range(2, 257), 512, 1024, 2048)  # small budgets need a large one


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


def filter_order(target_epsilon: float, target_delta: float, plan: Releases = ()) -> int:
    """The order of a filter, to be fixed before the first release: the one under which the ``plan`` costs least, or
    without a plan the one under which full-batch releases fill the budget last."""
    if plan := merge(plan):
        return min(FILTER_ORDERS[:255], key=lambda order: filter_epsilon(plan, target_delta, order))
    room = (target_epsilon - rdp_epsilon((), FILTER_ORDERS, target_delta)) / FILTER_ORDERS
    return FILTER_ORDERS[int(np.argmax(room))]


def filter_epsilon(releases: Releases, delta: float, order: int) -> float:
    """ε by a filter of that order."""
    check_delta(delta)
    releases = merge(releases)
    return max(0.0, float(rdp_epsilon(releases, (order,), delta)[0])) if releases else 0.0
