"""ε of releases whose parameters may depend on what was released before (Feldman and Zrnic 2021).

If a mechanism stops before the sum of its Rényi divergences of one order, fixed in advance, exceeds a bound, then it
has that bound as a whole, however its parameters were chosen.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from primia_lite.privacy.accounting import Release, Releases, merge, rdp_epsilon
from primia_lite.privacy.gaussian import check_delta

FILTER_ORDERS = (*range(2, 257), 512, 1024, 2048)  # small budgets need a large one


def filter_order(target_epsilon: float, target_delta: float, plan: Releases = ()) -> int:
    """The Rényi order of a filter, to be fixed before the first release.

    With a ``plan`` the order under which that plan costs least; else the one under which full-batch Gaussian releases
    fill the budget last.
    """
    if plan := merge(plan):
        return min(FILTER_ORDERS[:255], key=lambda order: filter_epsilon(plan, target_delta, order))
    room = (target_epsilon - rdp_epsilon((), FILTER_ORDERS, target_delta)) / FILTER_ORDERS
    return FILTER_ORDERS[int(np.argmax(room))]


def filter_epsilon(releases: Releases, delta: float, order: int) -> float:
    check_delta(delta)
    return _filter_epsilon(merge(releases), delta, order)


@lru_cache(maxsize=2048)
def _filter_epsilon(releases: tuple[Release, ...], delta: float, order: int) -> float:
    return max(0.0, float(rdp_epsilon(releases, (order,), delta)[0])) if releases else 0.0
