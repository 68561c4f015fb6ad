"""Discrete Gaussian noise, sampled exactly: whole numbers throughout, so no low bits give anything away.

N_Z(0, σ²) gives the whole number i with a probability proportional to exp(-i² / 2σ²) (Canonne, Kamath, Steinke 2020).
Mironov (CCS 2012) shows what floating-point noise may leak; here every decision is a comparison of uniform whole
numbers. How long it takes depends on what is drawn.
"""

from __future__ import annotations

import numpy as np

from primia_lite.config import UserError
from primia_lite.privacy.rng import SecureGenerator

_BLOCK = 1 << 16  # proposals at a time: what the processor's cache holds
# kσ + j stays below 2^63 for k < 64; a k of 64 or more comes once in e^2048 times.
MAX_SIGMA = 1 << 56
_ONE, _LARGEST = np.uint64(1), np.uint64(2**64 - 1)


def discrete_gaussian(n: int, sigma: int, rng: SecureGenerator) -> np.ndarray:
    """int64 [n], independent samples of N_Z(0, σ²), exact.

    Karney (ACM TOMS 42, 2016), algorithm D, for mean 0 and a whole σ: the result is ±(kσ + j), where k ≥ 0 is proposed
    with probability ∝ exp(-k / 2) and kept with exp(-k (k - 1) / 2), and j is uniform in [0, σ), kept with
    exp(-x (2k + x) / 2) for x = j / σ.

    Parameters
    ----------
    sigma
        σ, a whole number from 1 to 2^56. For large σ the standard deviation; for σ of 1 a little less.

    Raises
    ------
    UserError
        ``sigma`` isn't such a number.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, np.integer)) or not 1 <= sigma <= MAX_SIGMA:
        raise UserError(f"sigma is {sigma!r}: exact sampling takes a whole number from 1 to 2^56; round it up")
    out = np.empty(n, np.int64)
    filled = 0
    while filled < n:
        # About half of the proposals are kept.
        accepted = _proposals(min(_BLOCK, 2 * (n - filled) + 64), int(sigma), rng)[: n - filled]
        out[filled : filled + len(accepted)] = accepted
        filled += len(accepted)
    return out


def _proposals(n: int, sigma: int, rng: SecureGenerator) -> np.ndarray:
    """The results of n tries of algorithm D, less those that were refused."""
    k = _geometric(n, rng)
    k = k[_all_of(k * (k - 1), lambda which: _exp_half(len(which), rng))]
    j = _uniform(len(k), sigma, rng)
    negative = (rng.words(len(k)) & _ONE).astype(bool)
    kept = ~(negative & (k == 0) & (j == 0))  # there is one zero, not two
    k, j, negative = k[kept], j[kept], negative[kept]
    # exp(-x (2k + x) / 2) is the (k + 1)-th power of exp(-γ), γ = x (2k + x) / (2k + 2) below 1.
    kept = _all_of(
        k + 1, lambda which: _exp(len(which), lambda some: _gamma(k[which[some]], j[which[some]], sigma, rng), rng)
    )
    value = k[kept] * sigma + j[kept]
    return np.where(negative[kept], -value, value)


def _gamma(k: np.ndarray, j: np.ndarray, sigma: int, rng: SecureGenerator) -> np.ndarray:
    """bool: true with probability x (2k + x) / (2k + 2), x = j / σ, by factors so that nothing overflows."""
    success = _uniform(len(k), sigma, rng) < j  # x
    left = np.flatnonzero(success)
    m = _uniform(len(left), 2 * k[left] + 2, rng) - 2 * k[left]  # below 0: 2k of 2k + 2; and x of the one after
    success[left] = m < 0
    left = left[m == 0]
    success[left] = _uniform(len(left), sigma, rng) < j[left]
    return success


def _geometric(n: int, rng: SecureGenerator) -> np.ndarray:
    """int64 [n], k with probability ∝ exp(-k / 2)."""
    k = np.zeros(n, np.int64)
    left = np.arange(n)
    while len(left):
        left = left[_exp_half(len(left), rng)]
        k[left] += 1
    return k


def _all_of(times: np.ndarray, trial) -> np.ndarray:
    """bool [n]: whether ``times`` trials of each all succeed. ``trial`` takes indices [m] and gives bool [m]."""
    alive = np.ones(len(times), bool)
    done = 0
    left = np.flatnonzero(times > done)
    while len(left):
        success = trial(left)
        alive[left[~success]] = False
        done += 1
        left = left[success & (times[left] > done)]
    return alive


def _exp_half(n: int, rng: SecureGenerator) -> np.ndarray:
    """bool [n]: true with probability exp(-1/2)."""
    return _exp(n, lambda some: _uniform(len(some), 2, rng) == 0, rng)


def _exp(n: int, coin, rng: SecureGenerator) -> np.ndarray:
    """bool [n]: true with probability exp(-γ), where ``coin`` tosses one of probability γ ≤ 1 for each index given.

    Von Neumann's method, as Canonne, Kamath and Steinke (2020) have it in algorithm 1: the first K for which a coin
    of probability γ / K fails is odd.
    """
    odd = np.ones(n, bool)
    left, number = np.arange(n), 1
    while len(left):
        left = left[coin(left)]
        if number > 1:  # γ / K is γ times 1 / K
            left = left[_uniform(len(left), number, rng) == 0]
        odd[left] = number % 2 == 0
        number += 1
    return odd


def _uniform(n: int, m: int | np.ndarray, rng: SecureGenerator) -> np.ndarray:
    """int64 [n], uniform in [0, m), for one m or one of each [n]. Words beyond the last whole multiple of m are drawn
    again, so that no remainder is likelier than another."""
    m = np.asarray(m, np.uint64)
    last = _LARGEST - (_LARGEST % m + _ONE) % m  # 2^64 - 1 less 2^64 mod m
    word = rng.words(n)
    if len(over := np.flatnonzero(word > last)):
        word = word.copy()
        last = np.broadcast_to(last, n)
    while len(over):
        word[over] = rng.words(len(over))
        over = over[word[over] > last[over]]
    return (word % m).astype(np.int64)
