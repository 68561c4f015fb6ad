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
  along the way (:func:`filter_epsilon`, at whole orders).
- ``gdp``: Gaussian DP: exact for full batches; for sampled ones the central limit theorem (Bu, Dong, Long, Su 2020), an
  approximation that may understate ε.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING

import numpy as np

from primia_lite.config import UserError

if TYPE_CHECKING:  # imported where used: a process that only trains is there in half the time
    import dp_accounting

# Fractional orders are what counts where ε is large. One whose series doesn't converge is infinite, and drops out.
_ORDERS = (*(n / 10 for n in range(11, 110)), *range(11, 65), 80, 96, 128, 192, 256, 512, 1024)
# Of a filter: its one order is fixed in advance, and small budgets need a large one.
FILTER_ORDERS = (*range(2, 257), 512, 1024, 2048)
_POINTS = 2**18  # of a grid of privacy losses, about, at most
_PRV_ARRAYS = 12  # as long as its grid, held at once
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


def to_json(releases: Releases) -> str:
    return json.dumps([asdict(release) for release in merge(releases)])


def from_json(text: str) -> tuple[Release, ...]:
    return tuple(Release(**entry) for entry in json.loads(text))


def epsilon(releases: Releases, delta: float, accountant: str = "pld") -> float:
    """ε of everything released, at ``delta``; 0 for nothing. An upper bound, but for ``gdp``.

    Raises
    ------
    UserError
        ``delta`` outside (0, 1), an unknown accountant, or one that can't count this (``prv``, see above).
    """
    _check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise UserError(f"unknown accountant {accountant!r}: choose one of {', '.join(ACCOUNTANTS)}")
    return _epsilon(merge(releases), delta, accountant)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"delta is {delta}: it must be in (0, 1), and well below 1 / number of units")


@lru_cache(maxsize=512)
def _epsilon(releases: tuple[Release, ...], delta: float, accountant: str) -> float:
    if not releases:
        return 0.0
    if accountant == "gdp":
        return gaussian_epsilon(clt_mu(releases), delta)
    if accountant == "prv":
        return _prv_bracket(releases, delta).upper
    if accountant == "rdp":
        rdp = sum(r.steps * _rdp(r.noise_multiplier, r.sample_rate, _ORDERS) for r in releases)
        return max(0.0, float(_rdp_to_epsilon(rdp, np.array(_ORDERS), delta).min()))
    # Sampling hides: the same noise without it costs at least as much, and what that costs is known exactly.
    unsampled = gaussian_epsilon(_unsampled_mu(releases), delta)
    if unsampled == 0 or all(r.sample_rate == 1 for r in releases):
        return unsampled
    releases, tight = _one_gaussian(releases), math.inf
    interval = _interval(releases)
    if delta > _rounding(releases) and interval < 1:
        tight = _composed(releases, interval).get_epsilon_for_delta(delta - _rounding(releases))
    if math.isinf(tight):  # floats don't resolve so small a δ, or so wide a distribution
        tight = _epsilon(releases, delta, "rdp")
    return float(min(tight, unsampled))


# --- privacy loss distributions ---------------------------------------------------------------------------------------


def _one_gaussian(releases: tuple[Release, ...]) -> tuple[Release, ...]:
    """The same with all full batches as one step: Gaussians compose to a Gaussian, exactly."""
    sampled = tuple(r for r in releases if r.sample_rate < 1)
    if len(sampled) == len(releases):
        return sampled
    return (*sampled, Release(1 / _unsampled_mu(r for r in releases if r.sample_rate == 1), 1.0, 1))


def _rounding(releases: tuple[Release, ...]) -> float:
    """The most that rounding and cut tails move a composed δ: several times what was seen against exact Gaussians."""
    return 1e-16 * sum(r.steps for r in releases) + 2e-15 * len(releases)


def _spread(release: Release) -> float:
    """The range of a step's privacy loss but for e^-50 of it, at most."""
    return (0.5 / release.noise_multiplier + 20) / release.noise_multiplier


def _interval(releases: tuple[Release, ...]) -> float:
    """A grid for privacy losses. Any keeps the upper bound; this one keeps ε within 0.01 % of the best grid's.

    Connecting the dots adds about a tenth of the squared interval to the variance of each step's loss. A much finer
    grid adds rounding. A power of two: a ledger that grows keeps its grid, and what was counted on it.
    """
    scale = clt_mu(releases) / math.sqrt(sum(r.steps for r in releases))
    # At most so large are a step's mean loss and, but for large ones, half the variance (Rényi's order 2).
    mean = float(sum(r.steps * np.logaddexp(0, 2 * math.log(r.sample_rate) + r.noise_multiplier**-2) for r in releases))
    coarsest = (mean + 10 * math.sqrt(2 * mean) + max(map(_spread, releases))) / _POINTS
    return 2.0 ** math.floor(math.log2(max(min(0.03 * scale, 0.01), coarsest, 1e-8)))


def _part(release: Release, interval: float):
    step = _step(release.noise_multiplier, release.sample_rate, interval)
    return step.self_compose(release.steps) if release.steps > 1 else step


@lru_cache(maxsize=64)
def _step(noise_multiplier: float, sample_rate: float, interval: float):
    """Pessimistic privacy loss distribution of one step, both directions, by connecting the dots.

    As ``from_gaussian_mechanism`` of dp-accounting, which takes losses one at a time and some hundred times as long.
    """
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

    pmfs = []
    for direction in (AdjacencyType.REMOVE, AdjacencyType.ADD):
        loss = GaussianPrivacyLoss(noise_multiplier, sampling_prob=sample_rate, adjacency_type=direction)
        bounds = loss.connect_dots_bounds()
        low, high = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
        delta = _step_delta(
            np.arange(low, high + 1) * interval, noise_multiplier, sample_rate, direction is AdjacencyType.REMOVE
        )
        pmfs.append(pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, delta))
    return PrivacyLossDistribution(*pmfs)


def _step_delta(epsilon: np.ndarray, noise_multiplier: float, sample_rate: float, remove: bool) -> np.ndarray:
    """δ(ε) of one step in one direction; from the Gaussian's δ, as by Balle, Barthe, Gaboardi (2018, theorem 2)."""
    sign = 1.0 if remove else -1.0
    never = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf  # no output is less likely with the unit by more
    inside = sign * epsilon > never
    exponent = sign * np.where(inside, epsilon, 0.0)
    # The loss of the Gaussian alone: log(1 + (e^x - 1) / q), which is x - log q + log(1 - (1 - q) e^-x) for a large x.
    large = np.maximum(exponent, 30.0)
    plain = np.where(
        exponent > 30,
        large - math.log(sample_rate) + np.log1p((sample_rate - 1) * np.exp(-large)),
        np.log1p(np.expm1(np.minimum(exponent, 30.0)) / sample_rate),
    )
    delta = _gaussian_delta(sign * plain, 1 / noise_multiplier)
    if remove:
        delta = np.where(inside, sample_rate * delta, -np.expm1(np.minimum(epsilon, 0.0)))
    else:
        delta = np.where(inside, -np.expm1(np.minimum(epsilon + never, 0.0)) * delta, 0.0)
    return np.clip(delta, 0.0, 1.0)


@lru_cache(maxsize=256)
def _composed(releases: tuple[Release, ...], interval: float, bit: int = 0):
    """Pessimistic privacy loss distribution of all releases.

    Divided by one bit after the other of a hash: when a ledger grows by a release, only the divisions that hold it are
    composed anew, and the result is the same however it grew.
    """
    if len(releases) == 1:
        return _part(releases[0], interval)
    sides = [
        tuple(r for r in releases if hash((r.noise_multiplier, r.sample_rate)) >> bit & 1 == side) for side in (0, 1)
    ]
    first, *second = [_composed(side, interval, bit + 1) for side in sides if side]
    return first.compose(second[0]) if second else first


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
        ``delta`` outside (0, 1), an accountant that gives no lower bound, or what it can't count (see :func:`epsilon`;
        ``pld`` finds no lower bound for an ε of hundreds, or for very many steps).
    """
    _check_delta(delta)
    if accountant not in ("pld", "prv"):
        raise UserError(f"accountant {accountant!r} gives no lower bound: choose pld or prv")
    releases = merge(releases)
    if not releases:
        return Bracket(0.0, 0.0, 0.0)
    return _pld_bracket(releases, delta) if accountant == "pld" else _prv_bracket(releases, delta)


@lru_cache(maxsize=256)
def _pld_bracket(releases: tuple[Release, ...], delta: float) -> Bracket:
    from dp_accounting.pld import privacy_loss_distribution as pld

    upper = _epsilon(releases, delta, "pld")
    if all(r.sample_rate == 1 for r in releases):
        return Bracket(upper * (1 - 2e-12), upper * (1 - 1e-12), upper)  # exact, but for rounding
    # Optimistic rounding loses about half a grid interval a step: a grid that keeps this at 0.15 % of ε.
    releases = _one_gaussian(releases)
    interval = float(np.clip(0.003 * upper / sum(r.steps for r in releases), 1e-6, 5e-4))
    if (points := max(map(_spread, releases)) / interval) > 2**23:
        raise UserError(
            f"a lower bound of this epsilon, {upper:.4g} at most, would take a grid of {points:.2g} privacy losses: "
            "use epsilon(), which needs none"
        )
    parts = (
        pld.from_gaussian_mechanism(
            r.noise_multiplier, sampling_prob=r.sample_rate, pessimistic_estimate=False, use_connect_dots=False,
            value_discretization_interval=interval,
        ).self_compose(r.steps)
        for r in releases
    )  # fmt: skip
    total = reduce(lambda one, other: one.compose(other), parts)
    lower = min(upper, float(total.get_epsilon_for_delta(delta + _rounding(releases))))
    return Bracket(lower, (lower + upper) / 2, upper)


@lru_cache(maxsize=256)
def _prv_bracket(releases: tuple[Release, ...], delta: float) -> Bracket:
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    releases = _one_gaussian(releases)
    accountant = PRVAccountant()
    accountant.history = [(r.noise_multiplier, r.sample_rate, r.steps) for r in releases]
    error = {"eps_error": 1e-3 * max(_epsilon(releases, delta, "pld"), 1e-2), "delta_error": delta / 1000}
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # log(1 - q) at q = 1, and a note on RDP's orders
        warnings.simplefilter("ignore")
        try:
            domain = accountant._get_domain(
                prvs=[PoissonSubsampledGaussianPRV(q, sigma) for sigma, q, _ in accountant.history],
                num_self_compositions=[r.steps for r in releases], **error,
            )  # fmt: skip
            gib = 8 * domain.size * (len(releases) + _PRV_ARRAYS) / 2**30
            if domain.t_max > 690:
                raise ValueError(f"privacy losses reach {domain.t_max:.4g}, and beyond 690 e^loss overflows")
            if gib > 1:
                raise ValueError(f"its grid would take {gib:.1f} GiB of memory")
            if delta / 1000 < _rounding(releases):
                raise ValueError(f"a delta of {delta:g} is lost in rounding")
            bounds = accountant._get_dprv(**error).compute_epsilon(delta, **error)
            if not np.isfinite(bounds).all():
                raise ValueError("its sums overflow")
        except (ValueError, ArithmeticError, RuntimeError) as reason:
            raise UserError(
                f"PRV gives no bound for {', '.join(map(str, releases))} at delta {delta:g} ({reason}): use pld or rdp"
            ) from reason
    return Bracket(*(max(0.0, float(e)) for e in bounds))


# --- Gaussian DP: exact for full batches, approximate under sampling --------------------------------------------------


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ of the Gaussian mechanism with sensitivity / noise = ``mu``, exactly (Balle and Wang 2018, theorem 8)."""
    return float(_gaussian_delta(epsilon, mu))


def _gaussian_delta(epsilon, mu: float):
    size = np.abs(epsilon)
    delta = _delta_at(size / mu - mu / 2, mu)
    return np.where(epsilon < 0, -np.expm1(-size) + np.exp(-size) * delta, delta)


def _delta_at(z, mu: float):
    """δ at ε = μ (z + μ / 2) ≥ 0: Φ(-z) - e^ε Φ(-z - μ), written so that nothing overflows."""
    from scipy.special import erfcx, ndtr

    return ndtr(-z) - np.exp(-z * z / 2) * erfcx((z + mu) / math.sqrt(2)) / 2


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The inverse of :func:`gaussian_delta`, rounded up; infinite where a float can't hold it.

    Raises
    ------
    UserError
        ``delta`` outside (0, 1), or ``mu`` below 0.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    _check_delta(delta)
    if not mu >= 0:
        raise UserError(f"mu is {mu}: it must be 0 or more")
    if mu * mu == math.inf:
        return math.inf
    if mu == 0 or _delta_at(-mu / 2, mu) <= delta:
        return 0.0
    low, high = max(-mu / 2, -40.0), 1e-6 - float(ndtri(delta))  # there δ is 1 (or ε is 0), and already too small
    z = brentq(lambda z: _delta_at(z, mu) - delta, low, high, xtol=1e-13, maxiter=1000)
    return mu * (z + 1e-13 + mu / 2)


def _unsampled_mu(releases: Iterable[Release]) -> float:
    """μ of the same noise in full batches: μ² = Σ steps / σ²."""
    return math.hypot(*(math.sqrt(r.steps) / r.noise_multiplier for r in releases))


def _chi_squared(release: Release) -> float:
    """E of the squared density ratio of one full batch, minus 1: exp(1 / σ²) - 1, or a number that no sum overflows."""
    return math.expm1(min(300.0, release.noise_multiplier**-2))


def clt_mu(releases: Releases) -> float:
    """μ of Gaussian DP: μ² = Σ steps / σ² over full batches, exactly, plus Σ steps q² (exp(1 / σ²) - 1) over sampled
    ones, the limit of many steps (Bu, Dong, Long, Su 2020)."""
    releases = merge(releases)
    sampled = sum(r.sample_rate**2 * r.steps * _chi_squared(r) for r in releases if r.sample_rate < 1)
    return math.hypot(math.sqrt(sampled), _unsampled_mu(r for r in releases if r.sample_rate == 1))


# --- parameters chosen along the way ----------------------------------------------------------------------------------


def filter_order(target_epsilon: float, target_delta: float, plan: Releases = ()) -> int:
    """The Rényi order of a filter, to be fixed before the first release.

    With a ``plan`` the order under which that plan costs least; else the one under which full-batch Gaussian releases
    fill the budget last.
    """
    orders = FILTER_ORDERS
    if plan := merge(plan):
        return min(orders[:255], key=lambda order: filter_epsilon(plan, target_delta, order))
    room = [(target_epsilon - _rdp_to_epsilon(0.0, order, target_delta)) / order for order in orders]
    return int(orders[int(np.argmax(room))])


def filter_epsilon(releases: Releases, delta: float, order: int) -> float:
    """ε of releases whose parameters may depend on what was released before.

    Feldman and Zrnic (2021): if a mechanism stops before the sum of its Rényi divergences of one order,
    fixed in advance, exceeds a bound, then it has that bound as a whole, however its parameters were chosen. Converted
    to (ε, δ) as by Canonne, Kamath and Steinke (2020, proposition 12).
    """
    _check_delta(delta)
    return _filter_epsilon(merge(releases), delta, order)


@lru_cache(maxsize=2048)
def _filter_epsilon(releases: tuple[Release, ...], delta: float, order: int) -> float:
    if not releases:
        return 0.0
    rdp = sum(r.steps * float(_rdp(r.noise_multiplier, r.sample_rate, (order,))[0]) for r in releases)
    return max(0.0, float(_rdp_to_epsilon(rdp, order, delta)))


def _rdp_to_epsilon(rdp, order, delta: float):
    return rdp + np.log1p(-1 / order) - (math.log(delta) + np.log(order)) / (order - 1)


@lru_cache(maxsize=4096)
def _rdp(noise_multiplier: float, sample_rate: float, orders: tuple[float, ...]) -> np.ndarray:
    """Rényi divergences of one step, float64 [orders]."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders)
    with _quiet():
        accountant.compose(Release(noise_multiplier, sample_rate, 1).event())
    return np.maximum(accountant._rdp, 0.0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without dp-accounting's word on each order that doesn't converge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- units, hospitals, tuning -----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def child_epsilon(release: Release, films: int, delta: float) -> float:
    """What noise calibrated for one film gives a child with so many, each sampled on its own: an upper bound.

    In a step Binomial(k, q) of the child's films take part, and their clipped gradients may all point one way: a
    mixture of Gaussians (Choquette-Choo et al. 2023), composed by PLD.

    Raises
    ------
    UserError
        Fewer than one film.
    """
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
    from dp_accounting.pld import PLDAccountant
    from scipy.stats import binom

    _check_delta(delta)
    if films < 1:
        raise UserError(f"films is {films}: a child has at least one")
    if films == 1 or not release.steps:
        return epsilon(release, delta)
    if release.sample_rate == 1:
        return gaussian_epsilon(films * _unsampled_mu([release]), delta)
    taking_part = range(films + 1)
    step = MixtureOfGaussiansDpEvent(
        release.noise_multiplier, list(taking_part), list(binom.pmf(taking_part, films, release.sample_rate))
    )
    # All films in every step cost at least as much.
    mu = films * _unsampled_mu([release])
    always = gaussian_epsilon(mu, delta)
    if delta <= _rounding((release,)) or always == 0:
        return always
    # ε grows faster than k, and with it the width of the distribution: a coarser grid keeps it affordable, and the
    # value an upper bound.
    interval = max(0.01 * max(1.0, films / 5), (mu * mu / 2 + 20 * mu) / _POINTS)
    accountant = PLDAccountant(value_discretization_interval=interval)
    accountant.compose(step, release.steps)
    return min(always, float(accountant.get_epsilon(delta - _rounding((release,)))))


def group_privacy(epsilon: float, delta: float, films: int) -> tuple[float, float]:
    """(kε, k e^((k-1)ε) δ): what (ε, δ) for one film implies for k of them (Vadhan 2017, lemma 2.2). A δ of 1 or more
    promises nothing."""
    _check_delta(delta)
    if films < 1 or not epsilon >= 0:
        raise UserError(f"films is {films}, epsilon {epsilon}: take at least one film, and an epsilon of 0 or more")
    exponent = (films - 1) * epsilon
    return films * epsilon, films * delta * math.exp(exponent) if exponent < 700 else math.inf


def federation_epsilon(spent: Mapping[str, Releases], delta: float, *, shared_patients: bool = False) -> float:
    """ε of a federation from each hospital's releases.

    Parameters
    ----------
    shared_patients
        False: a child is at one hospital only, and the worst hospital's ε holds. True: a child may be at all of them,
        and their releases compose.
    """
    if shared_patients:
        return epsilon([r for releases in spent.values() for r in merge(releases)], delta)
    return max((epsilon(releases, delta) for releases in spent.values()), default=0.0)


def selection_epsilon(trial: Releases, mean_trials: float, delta: float) -> float:
    """ε of running a trial a Poisson number of times and releasing the best one only.

    Papernot and Steinke (2022), by RDP. Needs a score that costs no ε of its own, such as one on films outside the
    protected set. If every trial's result is seen, ``epsilon`` of all of them together is what was spent.
    """
    import dp_accounting
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    _check_delta(delta)
    if not mean_trials >= 1:
        raise UserError(f"mean_trials is {mean_trials}: it must be at least 1")
    run = dp_accounting.ComposedDpEvent([release.event() for release in merge(trial)])
    accountant = RdpAccountant(_ORDERS)
    with _quiet():
        accountant.compose(RepeatAndSelectDpEvent(run, mean_trials, math.inf))
    return float(accountant.get_epsilon(delta))


def attacker_power(releases: Releases, false_positive_rate: np.ndarray) -> np.ndarray:
    """An upper bound on the true positive rate of any test for one unit's presence, at each false positive rate.

    A test of (ε, δ(ε))-DP obeys TPR ≤ e^ε FPR + δ and, read backwards, TPR ≤ 1 - e^-ε (1 - δ - FPR) for every ε
    (Wasserman and Zhou 2010; Kairouz, Oh, Viswanath 2015); the least of these bounds over a grid of ε, by PLD.
    """
    from scipy.special import ndtr, ndtri

    rate = np.asarray(false_positive_rate, dtype=float)
    releases = merge(releases)
    if not releases:
        return rate
    unsampled = ndtr(ndtri(rate) + _unsampled_mu(releases))  # exact for full batches (Dong, Roth, Su 2022)
    releases = _one_gaussian(releases)
    if all(r.sample_rate == 1 for r in releases) or (interval := _interval(releases)) >= 1:
        return unsampled
    # Any grid gives a bound; beyond 700 e^ε overflows, and such an ε promises nothing.
    grid = np.linspace(0, min(700.0, max(1.0, 1.5 * epsilon(releases, 1e-6))), 400)
    delta = np.asarray(_composed(releases, interval).get_delta_for_epsilon(grid)) + _rounding(releases)
    forward = np.exp(grid)[:, None] * rate + delta[:, None]
    backward = 1 - np.exp(-grid)[:, None] * (1 - delta[:, None] - rate)
    return np.minimum(unsampled, np.minimum(forward, backward).min(0))


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
