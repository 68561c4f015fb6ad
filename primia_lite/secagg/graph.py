"""Who shares a mask with whom, where hospitals are many (Bell, Bonawitz, Gascón, Lepoint, Raykova, CCS 2020).

With n hospitals each pair sharing a mask costs each n - 1 masks. A random graph in which each has k neighbours hides as
well if no hospital's neighbours are too often corrupt or gone, and the honest ones stay connected. k grows as log n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from primia_lite.config import UserError

COMPLETE_UP_TO = 100  # so few hospitals share a mask with every other
# A server may draw many graphs and keep the worst: it chooses which advertisements to relay, and its own hospitals'
# keys. So many may it try, each of them a hash for every hospital (with 1,000 hospitals 2^50 hashes, a day of a
# graphics card), and a bad one is then among them with a chance of 2^-40.
TRIES_BITS = SECURITY_BITS = 40
CORRECTNESS_BITS = 30  # of a round that can't be unmasked although few enough hospitals are gone


def neighbours(names: Sequence[str], degree: int, seed: bytes) -> dict[str, tuple[str, ...]]:
    """A random graph in which each has ``degree`` neighbours, an even number or all others: a ring, shuffled by a
    ``seed`` that nobody chose alone, each joined to the nearest half degree on both sides (Bell et al., algorithm 1).
    """
    names = sorted(names)
    if degree >= len(names) - 1:
        return {name: tuple(other for other in names if other != name) for name in names}
    # Sorted by a hash, which every version of Python computes alike.
    start = hashlib.sha256(seed).digest()
    order = sorted(names, key=lambda name: hashlib.sha256(start + name.encode()).digest())
    n = len(order)
    return {
        name: tuple(sorted(order[(i + step) % n] for step in range(-degree // 2, degree // 2 + 1) if step))
        for i, name in enumerate(order)
    }


def default_threshold(hospitals: int) -> int:
    """Two thirds, rounded up: then a third may vanish, and a lying server needs more than a third to work with it."""
    return math.ceil(2 * hospitals / 3)


@lru_cache(maxsize=64)
def choose_degree(
    hospitals: int, corrupt: float = 0.1, gone: float = 0.1, threshold: int | None = None
) -> tuple[int, int]:
    """The least even degree, and the threshold of shares among neighbours, that bound what can go wrong where a share
    ``corrupt`` of all hospitals works with the server and a share ``gone`` vanishes (Bell et al., section 3.2; exact
    hypergeometric tails in place of their bounds):

    - no graph that :func:`withstands` refuses;
    - the honest hospitals that stay are connected, but for 2^-80: a cut of the ring needs degree / 2 in a row that are
      corrupt or gone;
    - at least the threshold of its neighbours stay, but for 2^-30: else the round ends without a sum.

    ``threshold`` is the fewest hospitals that take part, two thirds if left out. All others, and it, where no graph
    serves.
    """
    if not (corrupt >= 0 and gone >= 0 and corrupt + gone < 1):
        raise UserError(f"corrupt is {corrupt}, gone {gone}: together they must be below 1")
    from scipy.stats import hypergeom  # takes longer to import than a step of the protocol, and few hospitals need none

    others, least = hospitals - 1, threshold or default_threshold(hospitals)
    bad, away = math.ceil(corrupt * hospitals), math.ceil(gone * hospitals)
    for degree in range(2, least, 2):
        if hospitals * ((bad + away) / hospitals) ** (degree // 2) > 2.0 ** -(SECURITY_BITS + TRIES_BITS):
            continue
        counts = np.arange(degree + 1)
        staying_below = np.append(0.0, hypergeom.pmf(counts, others, others - away, degree).cumsum()[:-1])
        # The highest: what is certain is certain, more is safer.
        shares = min(int(np.flatnonzero(staying_below <= 2.0**-CORRECTNESS_BITS / hospitals)[-1]), least)
        if withstands(hospitals, degree, shares, least, corrupt):
            return degree, shares
    return others, least


def withstands(hospitals: int, degree: int, shares: int, threshold: int, corrupt: float = 0.1) -> bool:
    """Whether a server that lies, with a share ``corrupt`` of all hospitals, gets no single update, but for 2^-40.

    With a threshold of t shares, fewer than 2 t - degree - 1 of each honest hospital's neighbours must be corrupt. A
    server that follows the protocol needs t of them for a secret. One that lies needs fewer: it keeps some neighbours'
    shares from a hospital (which wants t - 1) and says that the rest have vanished, so that those give away its masks,
    and these (t with the corrupt ones) its own mask: 2 t - 1 from degree and the corrupt, counted twice.

    The server relays as few advertisements as it may, ``threshold``, the corrupt ones among them, and tries 2^40
    graphs: each may be bad with a chance of 2^-80, over all hospitals.
    """
    from scipy.stats import hypergeom

    bad, enough = math.ceil(corrupt * hospitals), 2 * shares - degree - 1
    if not (enough > 0 and degree < threshold and bad < threshold):
        return False
    counts = np.arange(enough, degree + 1)  # summed from the small ones up, which 1 - cdf would lose
    falls = float(hypergeom.pmf(counts, threshold - 1, bad, degree)[::-1].sum())
    return threshold * falls <= 2.0 ** -(SECURITY_BITS + TRIES_BITS)
