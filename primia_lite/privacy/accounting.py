"""What a series of noisy releases costs: ε at a given δ, from both sides, and the noise for a wanted ε.

Mechanism: the Poisson-subsampled Gaussian of DP-SGD (Abadi et al., CCS 2016). Adjacency: add or remove one unit (a
patient with all their films, or a film). Four accountants, of which two are bounds to rely on:

- ``pld``: privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022) by Google's dp-accounting. Rounded
  pessimistically they bound ε from above, optimistically from below; the worse of the two directions counts.
- ``prv``: privacy random variables (Gopi, Lee, Wutschitz 2021) by Opacus, in the direction of removal.
- ``rdp``: Rényi DP (Mironov 2017): an upper bound, looser, and the only one here that holds when parameters are chosen
  along the way (:func:`filter_epsilon`).
- ``gdp``: the central limit theorem of Gaussian DP (Bu, Dong, Long, Su 2020): an approximation that may understate ε.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from primia_lite.config import UserError

if TYPE_CHECKING:  # imported where used: a process that only trains is there in half the time
    import dp_accounting

# Integer orders: their moments have a closed form; the fractional ones don't converge at large sample rates.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
# Of a filter: its one order is fixed in advance, and small budgets need a large one.
FILTER_ORDERS = (*range(2, 257), 512, 1024, 2048)
ACCOUNTANTS = {
    "pld": "upper bound, by privacy loss distributions",
    "prv": "upper bound, by privacy random variables: removal only",
    "rdp": "upper bound, by Rényi DP: looser",
    "gdp": "central limit approximation: may understate",
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
        if not 0 < self.noise_multiplier < math.inf:
            raise UserError(
                f"noise_multiplier is {self.noise_multiplier}: it must be above 0 (0 protects nobody) and finite"
            )
        if not 0 < self.sample_rate <= 1:
            raise UserError(f"sample_rate is {self.sample_rate}: it must be in (0, 1]")
        if not (isinstance(self.steps, (int, np.integer)) and self.steps >= 0):
            raise UserError(f"steps is {self.steps}: it must be a whole number, not negative")

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
        ``delta`` outside (0, 1) or an unknown accountant.
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
    if accountant == "pld":
        # Connecting the dots stays an upper bound on any grid; on this one it is within 0.01 % of a finer one's.
        interval = float(np.clip(1e-4 * _epsilon(releases, delta, "rdp"), 1e-5, 1e-3))
        return float(_pld(releases, interval).get_epsilon_for_delta(delta))
    from dp_accounting.rdp import RdpAccountant

    total = RdpAccountant(_ORDERS)
    for release in releases:
        total.compose(release.event())
    return float(total.get_epsilon(delta))


def _pld(releases: Sequence[Release], interval: float, pessimistic: bool = True):
    """Composed privacy loss distribution, both directions. Only the pessimistic one can connect the dots."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = None
    for release in releases:
        part = pld.from_gaussian_mechanism(
            release.noise_multiplier, sampling_prob=release.sample_rate, pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic, value_discretization_interval=interval,
        ).self_compose(release.steps)  # fmt: skip
        total = part if total is None else total.compose(part)
    return total


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
        ``delta`` outside (0, 1), or an accountant that gives no lower bound.
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
    # Optimistic rounding loses about half a grid interval a step: a grid that keeps this at 0.15 % of ε.
    rough = _epsilon(releases, delta, "rdp")
    interval = float(np.clip(0.003 * rough / sum(r.steps for r in releases), 1e-6, 5e-4))
    lower = _pld(releases, interval, pessimistic=False).get_epsilon_for_delta(delta)
    upper = min(_pld(releases, interval).get_epsilon_for_delta(delta), _epsilon(releases, delta, "pld"))
    return Bracket(lower, (lower + upper) / 2, upper)


@lru_cache(maxsize=256)
def _prv_bracket(releases: tuple[Release, ...], delta: float) -> Bracket:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(r.noise_multiplier, r.sample_rate, r.steps) for r in releases]
    error = 1e-3 * max(_epsilon(releases, delta, "rdp"), 1e-2)
    with warnings.catch_warnings(), np.errstate(divide="ignore"):  # log(1 - q) at q = 1, and a note on RDP's orders
        warnings.simplefilter("ignore")
        distribution = accountant._get_dprv(eps_error=error, delta_error=delta / 1000)
        return Bracket(*(max(0.0, float(e)) for e in distribution.compute_epsilon(delta, delta / 1000, error)))


# --- Gaussian DP: exact for full batches, approximate under sampling --------------------------------------------------


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ of the Gaussian mechanism with sensitivity / noise = ``mu``, exactly (Balle and Wang 2018, theorem 8)."""
    from scipy.stats import norm

    # In logarithms: e^ε overflows long before the product matters.
    return float(norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The inverse of :func:`gaussian_delta`."""
    from scipy.optimize import brentq

    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, mu) > delta:
        high *= 2
    return float(brentq(lambda e: gaussian_delta(e, mu) - delta, 0.0, high, xtol=1e-12))


def clt_mu(releases: Releases) -> float:
    """μ = q sqrt(T (exp(1 / σ²) - 1)), the limit of many steps (Bu, Dong, Long, Su 2020)."""
    return math.sqrt(
        sum(r.sample_rate**2 * r.steps * math.expm1(min(700.0, r.noise_multiplier**-2)) for r in merge(releases))
    )


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
    return max(0.0, _rdp_to_epsilon(sum(r.steps * _rdp(r.noise_multiplier, r.sample_rate, order) for r in releases),
                                    order, delta))  # fmt: skip


def _rdp_to_epsilon(rdp: float, order: int, delta: float) -> float:
    return rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@lru_cache(maxsize=4096)
def _rdp(noise_multiplier: float, sample_rate: float, order: int) -> float:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([order])
    accountant.compose(Release(noise_multiplier, sample_rate, 1).event())
    return float(accountant._rdp[0])


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
        return epsilon(Release(release.noise_multiplier / films, 1.0, release.steps), delta)
    taking_part = range(films + 1)
    step = MixtureOfGaussiansDpEvent(
        release.noise_multiplier, list(taking_part), list(binom.pmf(taking_part, films, release.sample_rate))
    )
    # ε grows faster than k, and with it the width of the distribution: a coarser grid keeps it affordable, and the
    # value an upper bound.
    accountant = PLDAccountant(value_discretization_interval=0.01 * max(1.0, films / 5))
    accountant.compose(step, release.steps)
    return float(accountant.get_epsilon(delta))


def group_privacy(epsilon: float, delta: float, films: int) -> tuple[float, float]:
    """(kε, k e^((k-1)ε) δ): what (ε, δ) for one film implies for k of them (Vadhan 2017, lemma 2.2). A δ of 1 or more
    promises nothing."""
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
    accountant.compose(RepeatAndSelectDpEvent(run, mean_trials, math.inf))
    return float(accountant.get_epsilon(delta))


def attacker_power(releases: Releases, false_positive_rate: np.ndarray) -> np.ndarray:
    """An upper bound on the true positive rate of any test for one unit's presence, at each false positive rate.

    A test of (ε, δ(ε))-DP obeys TPR ≤ e^ε FPR + δ and, read backwards, TPR ≤ 1 - e^-ε (1 - δ - FPR) for every ε
    (Wasserman and Zhou 2010; Kairouz, Oh, Viswanath 2015); the least of these bounds over a grid of ε, by PLD.
    """
    rate = np.asarray(false_positive_rate, dtype=float)
    releases = merge(releases)
    if not releases:
        return rate
    # Any grid gives a bound; beyond 700 e^ε overflows, and such an ε promises nothing.
    grid = np.linspace(0, min(700.0, max(1.0, 1.5 * epsilon(releases, 1e-6))), 400)
    delta = np.asarray(_pld(releases, 1e-3).get_delta_for_epsilon(grid))
    forward = np.exp(grid)[:, None] * rate + delta[:, None]
    backward = 1 - np.exp(-grid)[:, None] * (1 - delta[:, None] - rate)
    return np.minimum(1.0, np.minimum(forward, backward).min(0))


# --- noise for a wanted ε ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def calibrate_noise_multiplier(
    target_epsilon: float, target_delta: float, sample_rate: float, steps: int, also: tuple[Release, ...] = ()
) -> float:
    """The smallest σ, rounded up to 4 decimals, whose ε over ``steps`` is at most ``target_epsilon`` by PLD.

    ``also``: other releases that share the budget.

    RDP brackets the answer in milliseconds; the slower PLD accountant then settles it.

    Raises
    ------
    UserError
        ``target_epsilon`` is not above 0 or out of reach.
    """
    from scipy.optimize import brentq

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
