"""Lower bounds on ε from an attack's scores: what an audit found, with a stated chance of error.

An (ε, δ) that is claimed holds for every attack. So an attack that does too well refutes it, and the largest ε that is
refuted is a lower bound. A bound below the claim is no proof of anything: another attack may do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri
from scipy.stats import beta, binom

from primia_lite.config import UserError
from primia_lite.privacy.accounting import Release, epsilon
from primia_lite.privacy.accounting.gaussian import gaussian_epsilon
from primia_lite.privacy.accounting.guarantees import tpr_upper_bound

THRESHOLDS = 300
MOST = 50.0  # no bound above: an attack that never errs refutes every ε


def error_rates(present: np.ndarray, absent: np.ndarray, threshold: float, alpha: float) -> tuple[float, float]:
    """Upper bounds on false positive and false negative rate of "present above the threshold", each wrong with
    probability at most ``alpha`` / 2 (Clopper and Pearson 1934)."""

    def most(errors: int, n: int) -> float:
        return 1.0 if errors >= n else float(beta.ppf(1 - alpha / 2, errors + 1, n - errors))

    return most(int((absent > threshold).sum()), len(absent)), most(int((present <= threshold).sum()), len(present))


def clopper_pearson_epsilon(rates: tuple[float, float], delta: float) -> float:
    """The ε that error rates (false positive, false negative) refute: TPR ≤ e^ε FPR + δ, either way round."""
    found = 0.0
    for wrong, missed in (rates, rates[::-1]):
        if 1 - missed - delta > 0 and wrong > 0:
            found = max(found, math.log((1 - missed - delta) / wrong))
    return min(found, MOST)


def gaussian_mu(rates: tuple[float, float]) -> float:
    """μ of the Gaussian mechanism (Dong, Roth and Su 2022) whose trade-off passes through these error rates."""
    return max(0.0, float(-ndtri(rates[0]) - ndtri(rates[1])))


@dataclass(frozen=True)
class TwoSampleBounds:
    """What scores with and without one unit show: error rates (upper bounds) of the threshold that is best by Clopper
    and Pearson and of the one best for a Gaussian, and ε at least by either."""

    rates: tuple[float, float]
    gaussian_rates: tuple[float, float]
    epsilon: float
    gaussian_epsilon: float


def two_sample_bounds(present: np.ndarray, absent: np.ndarray, delta: float, alpha: float = 0.05) -> TwoSampleBounds:
    """Lower bounds on ε from scores of many runs with and without one unit: for any mechanism, and "if Gaussian", for
    one whose trade-off is a Gaussian's, as that of full batches is.

    A threshold is chosen on the first half of the scores, and counted on the second. With n runs in the second half the
    first bound can't pass log(n / 4) or so, however good the attack: no error in n runs leaves a rate of 3.7 / n.

    Raises
    ------
    UserError
        Fewer than 8 scores on a side, or scores that aren't finite.
    """
    present, absent = _scores(present, "with the canary"), _scores(absent, "without it")
    halves = [(scores[: len(scores) // 2], scores[len(scores) // 2 :]) for scores in (present, absent)]
    (first_in, second_in), (first_out, second_out) = halves
    tried = np.quantile(np.concatenate([first_in, first_out]), np.linspace(0.002, 0.998, THRESHOLDS))
    seen = [error_rates(first_in, first_out, threshold, alpha) for threshold in tried]

    def chosen(worth: Callable[[tuple[float, float]], float]) -> tuple[float, float]:
        best = tried[int(np.argmax([worth(rates) for rates in seen]))]
        return error_rates(second_in, second_out, best, alpha)

    rates, gaussian = chosen(lambda rates: clopper_pearson_epsilon(rates, delta)), chosen(gaussian_mu)
    mu = gaussian_mu(gaussian)
    most = min(MOST, gaussian_epsilon(mu, delta)) if mu else 0.0
    return TwoSampleBounds(rates, gaussian, clopper_pearson_epsilon(rates, delta), most)


def _scores(scores: np.ndarray, what: str) -> np.ndarray:
    scores = np.asarray(scores, float)
    if len(scores) < 8:
        raise UserError(f"there are {len(scores)} runs {what}: a bound needs at least 8, and some hundred to say much")
    if not np.isfinite(scores).all():
        raise UserError(f"scores {what} aren't all finite")
    return scores


def one_run_p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The most probable that (ε, δ)-DP makes it to guess at least ``right`` of ``guesses`` canaries right, each of
    ``canaries`` in or out with probability 1/2 (Steinke, Nasr, Jagielski 2023, theorem 5.2)."""
    chance = expit(epsilon)
    tail = binom.sf(right - 1, guesses, chance)
    if not delta or not right:
        return float(tail)
    fewer = np.arange(1, right + 1)
    below = binom.sf(right - fewer - 1, guesses, chance) - tail
    return float(min(1.0, tail + 2 * canaries * delta * (below / fewer).max()))


def one_run_epsilon(right: int, guesses: int, canaries: int, delta: float, alpha: float = 0.05) -> float:
    """The largest ε that so many right guesses in one run refute, by :func:`one_run_p_value`."""
    _check_guesses(right, guesses, canaries)
    return _largest(lambda epsilon: alpha - one_run_p_value(right, guesses, canaries, epsilon, delta))


def one_run_gaussian_epsilon(right: int, guesses: int, canaries: int, delta: float, alpha: float = 0.05) -> float:
    """The same, if the mechanism's trade-off is a Gaussian's: more, and no bound for other mechanisms."""
    _check_guesses(right, guesses, canaries)

    def excess(epsilon: float) -> float:
        mu = _mu_of(epsilon, delta)
        return one_run_excess(right, guesses, canaries, lambda rate: float(ndtr(ndtri(rate) - mu)), alpha)

    return _largest(excess)


TradeOff = Callable[[float], float]  # the smallest false positive rate of a test with a given true positive rate


def one_run_excess(right: int, guesses: int, canaries: int, trade_off: TradeOff, alpha: float) -> float:
    """Positive if a mechanism of this trade-off can't make so many guesses right, but with probability ``alpha``
    (Mahloujifar, Melis, Chaudhuri 2024, algorithm 3)."""
    hits, misses = alpha * right / canaries, alpha * (guesses - right) / canaries
    for fewer in range(right - 1, -1, -1):
        more = max(misses, trade_off(hits))
        if more == misses:
            break
        hits, misses = min(1.0, hits + fewer / (guesses - fewer) * (more - misses)), more
    return hits + misses - guesses / canaries


def two_sample_excess(rates: tuple[float, float], trade_off: TradeOff) -> float:
    """Positive if no test against a mechanism of this trade-off has error rates as low as these."""
    return trade_off(1 - rates[1]) - rates[0]


def mechanism_epsilon(excess: Callable[[TradeOff], float], claimed: Release, delta: float) -> float:
    """ε of DP-SGD (``claimed``'s sample rate and steps) with the least noise that the scores refute.

    It holds for what it is named after, the Poisson-subsampled Gaussian mechanism, whatever its noise; ``excess`` is
    positive for a trade-off that is refuted. To within 3 % of the noise multiplier.
    """
    levels = np.linspace(-8, 8, 1601)

    def refuted(sigma: float) -> bool:
        bound = ndtri(tpr_upper_bound(replace(claimed, noise_multiplier=sigma), ndtr(levels)).clip(1e-300, 1 - 1e-16))
        return excess(lambda rate: float(ndtr(np.interp(ndtri(rate), bound, levels)))) > 0

    low, high = claimed.noise_multiplier / 8, claimed.noise_multiplier * 32
    if not refuted(high):
        return 0.0
    while high > 1.03 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return min(MOST, epsilon(replace(claimed, noise_multiplier=high), delta))


@lru_cache(maxsize=4096)
def _mu_of(epsilon: float, delta: float) -> float:
    """μ of the Gaussian mechanism that is exactly (ε, δ)-DP."""
    low, high = 1e-6, 1.0
    while gaussian_epsilon(high, delta) < epsilon:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_epsilon(middle, delta) < epsilon else (low, middle)
    return high


def _check_guesses(right: int, guesses: int, canaries: int) -> None:
    if not 0 <= right <= guesses <= canaries or not guesses:
        raise UserError(f"{right} of {guesses} guesses of {canaries} canaries: guess at least one, at most all of them")


def _largest(refuted: Callable[[float], float]) -> float:
    """Where ``refuted`` (positive: refuted) ends being positive; 0 if it never is."""
    if refuted(1e-6) <= 0:
        return 0.0
    high = 1.0
    while refuted(high) > 0:
        high *= 2
        if high > MOST:
            return MOST
    return float(brentq(refuted, 1e-6, high, xtol=1e-5))
